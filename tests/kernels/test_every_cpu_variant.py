"""Risk: only the kernels of the developer's CPU are tested.

KT_KERNEL_CPU_VARIANT is read once per process, so each variant that this CPU can stand in for gets a process
that runs the arithmetic tests again; the tests of this process have covered the CPU's own variant. A CPU with
AVX512-BF16 but without AMX stands in for one with AMX by trapping its instructions (trapped_amx.py). Variants
that this CPU lacks features for even so are listed as not run.
"""

from __future__ import annotations

import json
import re

import pytest
import trapped_amx
from formats import CODES, METHODS
from harness import chosen_kernels
from isolation import python

AVX2 = {"avx2", "fma", "f16c"}
AVX512 = AVX2 | {"avx512f", "avx512bw", "avx512vl", "avx512dq"}
AVX512_VNNI = AVX512 | {"avx512_vnni"}
AVX512_BF16 = AVX512_VNNI | {"avx512_bf16"}
AVX512_BF16_FMA = AVX512_BF16 | {"fma_beats_dot"}
AMX = AVX512_BF16 | {"amx_tile", "amx_bf16", "amx_int8"}

DETECTED = trapped_amx.detected()
WITH_TRAPS = trapped_amx.seen()
# The look-ups of these kernels need VBMI, which all CPUs with AVX512-BF16 but Cooper Lake have.
E4M3_BF16 = "e4m3.avx512_bf16" if "avx512_vbmi" in DETECTED else "e4m3.avx512"

# AMX has kernels for bf16 only.
SUFFIX = "_fma" if "fma_beats_dot" in WITH_TRAPS else ""
BESIDE_AMX = (E4M3_BF16 + SUFFIX, "code4.avx512_bf16" + SUFFIX)

# variant -> (features it needs, the kernels it must choose for bf16, e4m3 and 4-bit codes)
VARIANTS = {
    "avx2": (AVX2, ("bf16.avx2", "e4m3.avx2", "code4.avx2")),
    "avx_vnni": (AVX2 | {"avx_vnni"}, ("bf16.avx2", "e4m3.avx2", "code4.avx2")),
    "avx512": (AVX512, ("bf16.avx512", "e4m3.avx512", "code4.avx512")),
    "avx512_vnni": (AVX512_VNNI, ("bf16.avx512", "e4m3.avx512", "code4.avx512")),
    "avx512_bf16": (AVX512_BF16, ("bf16.avx512_bf16", E4M3_BF16, "code4.avx512_bf16")),
    "avx512_bf16_fma": (
        AVX512_BF16_FMA,
        ("bf16.avx512_bf16", "e4m3.avx512_bf16_fma", "code4.avx512_bf16_fma"),
    ),
    "amx": (AMX, ("bf16.amx", *BESIDE_AMX)),
}
# A variant may keep these although it does not need them.
BESIDE_BF16 = {"avx512_vbmi", "avx_vnni"}
TOLERATED = {
    "avx512_bf16": BESIDE_BF16,
    "avx512_bf16_fma": BESIDE_BF16,
    "amx": BESIDE_BF16 | {"fma_beats_dot"},
}

# The files whose outcome depends on the instruction set.
ARITHMETIC = [
    "test_exact_on_integers.py",
    "test_every_code_and_scale.py",
    "test_error_is_small.py",
    "test_result_depends_on_the_token_alone.py",
    "test_stray_reads_and_writes.py",
    "test_special_values.py",
    "test_swiglu.py",
]


def lacking(variant: str) -> set[str]:
    return VARIANTS[variant][0] - WITH_TRAPS


@pytest.fixture
def process_of(request):
    """variant -> the variables of a process that is capped to it, with traps if this CPU needs them."""

    def variables(variant: str) -> dict[str, str]:
        native = VARIANTS[variant][0] <= DETECTED
        traps = {} if native else request.getfixturevalue("trapped")
        return traps | {"KT_KERNEL_CPU_VARIANT": variant}

    return variables


def variants(names) -> list:
    """Parameters: variants this CPU lacks something for are skipped with the reason."""
    return [
        pytest.param(
            name,
            marks=pytest.mark.skipif(
                bool(lacking(name)),
                reason=f"NOT RUN: variant {name}: this CPU lacks {', '.join(sorted(lacking(name)))}",
            ),
        )
        for name in names
    ]


def kernel_of_each_method(variant: str) -> dict[str, str]:
    bf16, e4m3, code4 = VARIANTS[variant][1]
    kernels = {"bf16": bf16, "e4m3": e4m3, "int4": code4, "e2m1": code4}
    return {method: kernels[CODES[method]] for method in METHODS}


def representatives() -> list[str]:
    """The lowest variant of each choice of kernels, without the one that this process itself makes.

    Where traps stand in for features, one variant will do: that with AMX has the other kernels as well.
    """
    own = chosen_kernels()
    lowest: dict[tuple, str] = {}
    for name, (needs, kernels) in VARIANTS.items():
        if name == "amx" or needs <= DETECTED or lacking(name):
            lowest.setdefault(kernels, name)
    return [name for name in lowest.values() if kernel_of_each_method(name) != own]


SHOW = """
import json
from harness import chosen_kernels, ext
print(json.dumps(ext.cpu_features() | {"chosen": chosen_kernels()}))
"""


@pytest.mark.parametrize("variant", variants(VARIANTS))
def test_cap_is_obeyed_and_chooses_its_kernels(variant, process_of):
    needs, _ = VARIANTS[variant]
    done = python("-c", SHOW, **process_of(variant))
    assert done.returncode == 0, done.stdout
    features = json.loads(done.stdout)
    assert features["variant"] == features["cap"] == variant
    assert set(features["detected"]) == (DETECTED if needs <= DETECTED else WITH_TRAPS)
    assert needs <= set(features["active"]) <= needs | TOLERATED.get(variant, set())
    assert features["chosen"] == kernel_of_each_method(variant)


@pytest.mark.parametrize("variant", variants(representatives()))
def test_arithmetic_of(variant, process_of):
    """All of ARITHMETIC, in a process capped to the variant; where instructions trap, the smaller sweep."""
    variables = process_of(variant)
    if "LD_PRELOAD" in variables:
        variables["KT_TEST_SWEEP"] = "small"
    done = run_arithmetic(**variables)
    assert done.returncode == 0, f"with KT_KERNEL_CPU_VARIANT={variant}:\n{done.stdout}"
    assert passed(done.stdout) > (300 if "LD_PRELOAD" in variables else 1500)


def test_tiles_that_linux_refuses_are_not_used(trapped):
    done = python("-c", SHOW, **trapped, KT_TEST_TILES="refused")
    assert done.returncode == 0, done.stdout
    features = json.loads(done.stdout)
    assert set(features["detected"]) == WITH_TRAPS - trapped_amx.FEATURES
    assert not [kernel for kernel in features["chosen"].values() if "amx" in kernel]


DIGESTS = """
import hashlib
from formats import FORMATS
from harness import build_layer, ext, random_call, random_experts, run
for format in FORMATS:
    experts = random_experts(1, 3, 300, 170, format)
    layer = build_layer(ext.Engine(2), experts)
    call = random_call(1, experts, 40, top_k=2)
    for tokens in (1, 40):
        print(format, tokens, hashlib.sha256(run(layer, call.rows(slice(tokens))).tobytes()).hexdigest())
"""


def two_variants(one: str, other: str):
    """Skipped where this CPU lacks something for the second."""
    return pytest.param(one, other, marks=variants([other])[0].marks, id=f"{one}-{other}")


@pytest.mark.parametrize(
    ("one", "other"), [two_variants("avx2", "avx512"), two_variants("avx512_bf16", "avx512_bf16_fma")]
)
def test_same_bits(one, other, process_of):
    """doc/kernels.md: AVX2 and AVX512 on fp32 activations; VDPBF16PS and the FMA in its place on Intel."""
    done, wider = (python("-c", DIGESTS, **process_of(v)) for v in (one, other))
    assert done.returncode == wider.returncode == 0, done.stdout + wider.stdout
    assert len(done.stdout.splitlines()) > 50
    assert done.stdout.splitlines() == wider.stdout.splitlines()


def run_arithmetic(*options: str, **environment: str):
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", *options, *ARITHMETIC]
    return python(*command, timeout=600, **environment)


def passed(report: str) -> int:
    found = re.search(r"(\d+) passed", report)
    return int(found[1]) if found else 0
