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
from formats import CODES, INT8_PATHS, OTHER_NAMES
from gguf_blocks import GGUF_METHOD, PANEL_TYPES
from harness import chosen_kernels, ext, make_layer, random_experts
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
E4M3_BF16, E4M3_AMX = ("avx512_bf16", "amx") if "avx512_vbmi" in DETECTED else ("avx512", "avx512")


def kernels(bf16: str, e4m3: str, code4: str, int8: str, integers: str) -> dict[tuple[str, str], str]:
    """(codes, activations) -> name: from the end of each with bf16 activations, and of those with int8."""
    by_bf16 = {"bf16": bf16, "e4m3": e4m3, "code4": code4, "int8": int8}
    return {
        **{(codes, "bf16"): f"{codes}.{end}" for codes, end in by_bf16.items()},
        **{(codes, "int8"): f"{codes}_int8.{integers}" for codes in ("code4", "int8")},
    }


# variant -> (features it needs, the kernels it must choose)
VARIANTS = {
    "avx2": (AVX2, kernels("avx2", "avx2", "avx2", "avx2", "avx2")),
    "avx_vnni": (AVX2 | {"avx_vnni"}, kernels("avx2", "avx2", "avx2", "avx2", "avx_vnni")),
    "avx512": (AVX512, kernels("avx512", "avx512", "avx512", "avx512", "avx512")),
    "avx512_vnni": (AVX512_VNNI, kernels("avx512", "avx512", "avx512", "avx512", "avx512_vnni")),
    "avx512_bf16": (
        AVX512_BF16,
        kernels("avx512_bf16", E4M3_BF16, "avx512_bf16", "avx512_bf16", "avx512_vnni"),
    ),
    "avx512_bf16_fma": (
        AVX512_BF16_FMA,
        kernels("avx512_bf16", "avx512_bf16_fma", "avx512_bf16_fma", "avx512_bf16", "avx512_vnni"),
    ),
    "amx": (AMX, kernels("amx", E4M3_AMX, "amx", "amx", "amx")),
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
    "test_integer_sums.py",
    "test_every_code_and_scale.py",
    "test_error_is_small.py",
    "test_result_depends_on_the_token_alone.py",
    "test_stray_reads_and_writes.py",
    "test_special_values.py",
    "test_swiglu.py",
    "test_gguf_panels.py",
    "test_training.py",
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


def kernels_of_each_method(variant: str) -> dict[str, dict[str, str]]:
    """As chosen_kernels() in a process capped to the variant."""
    codes_of_kind = {"bf16": "bf16", "e4m3": "e4m3", "int4": "code4", "e2m1": "code4", "int8": "int8"}
    methods = CODES | {name: CODES[other] for name, other in OTHER_NAMES.items()}
    return {
        method: {
            activations: kernel
            for (codes, activations), kernel in VARIANTS[variant][1].items()
            if codes == codes_of_kind[kind]
        }
        for method, kind in methods.items()
    }


def of_plain_methods(chosen: dict[str, dict[str, str]]) -> dict[str, dict[str, str]]:
    return {name: kernels for name, kernels in chosen.items() if not name.startswith(GGUF_METHOD)}


def named(chosen: dict[str, dict[str, str]]) -> set[str]:
    return {kernel for kernels in chosen.values() for kernel in kernels.values()}


def representatives() -> list[str]:
    """The variants that bring kernels which neither this process nor a variant before has.

    Where traps stand in for features, that with AMX will do: FMA in place of VDPBF16PS, which it does not
    choose, has test_same_bits.
    """
    found, tested = [], named(of_plain_methods(chosen_kernels()))
    for name, (needs, _) in VARIANTS.items():
        new = named(kernels_of_each_method(name)) - tested
        if new and (name == "amx" or needs <= DETECTED or lacking(name)):
            found.append(name)
            tested |= new
    return found


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
    chosen = features["chosen"]
    assert of_plain_methods(chosen) == kernels_of_each_method(variant)
    with_int8 = VARIANTS[variant][1]["code4", "int8"].partition(".")[2]
    for type in PANEL_TYPES:
        assert chosen[f"{GGUF_METHOD} {type}"]["int8"].endswith(f"_int8.{with_int8}")


@pytest.mark.parametrize("variant", variants(representatives()))
def test_arithmetic_of(variant, process_of):
    """All of ARITHMETIC, in a process capped to the variant; where instructions trap, the smaller sweep."""
    variables = process_of(variant)
    variables["KT_TEST_SWEEP"] = "small" if "LD_PRELOAD" in variables else "capped"
    done = run_arithmetic(**variables)
    assert done.returncode == 0, f"with KT_KERNEL_CPU_VARIANT={variant}:\n{done.stdout}"
    assert passed(done.stdout) > (300 if "LD_PRELOAD" in variables else 1500)


def test_tiles_that_linux_refuses_are_not_used(trapped):
    done = python("-c", SHOW, **trapped, KT_TEST_TILES="refused")
    assert done.returncode == 0, done.stdout
    features = json.loads(done.stdout)
    assert set(features["detected"]) == WITH_TRAPS - trapped_amx.FEATURES
    assert features["no_tiles"] == "Linux refuses AMX tiles (arch_prctl: Operation not permitted)"
    assert not [kernel for kernel in named(features["chosen"]) if "amx" in kernel]


@pytest.mark.parametrize("method", [*CODES, *OTHER_NAMES])
def test_a_layer_has_the_kernels_of_its_activations(method):
    engine, experts = ext.Engine(1), random_experts(1, 1, 32, 32)
    chosen = chosen_kernels()[method]
    automatic = [row for row in ext.dispatch_table() if row["method"] == method and row["state"] == "chosen"]
    assert len(automatic) == 1
    for activations, kernel in {**chosen, "auto": automatic[0]["kernel"]}.items():
        layer = make_layer(engine, experts, method=method, activations=activations)
        assert layer.kernels == {"experts": kernel}


DIGESTS = """
import hashlib, sys
import formats
from harness import build_layer, ext, random_call, random_experts, run
hidden, intermediate, *counts = map(int, sys.argv[2:])
for format in getattr(formats, sys.argv[1]):
    experts = random_experts(1, 3, hidden, intermediate, format)
    layer = build_layer(ext.Engine(2), experts)
    call = random_call(1, experts, max(counts), top_k=2)
    for tokens in counts:
        output = run(layer, call.rows(slice(tokens)))
        print(format, tokens, hashlib.sha256(output.tobytes()).hexdigest())
"""


def digests(formats: str, *sizes: int, **environment: str) -> list[str]:
    """A line of the results' bits for each of these formats and each number of tokens.

    sizes: hidden, intermediate, numbers of tokens.
    """
    done = python("-c", DIGESTS, formats, *map(str, sizes), **environment)
    assert done.returncode == 0, done.stdout
    return [line for line in done.stdout.splitlines() if not line.startswith("qemu")]


def two_variants(one: str, other: str):
    """Skipped where this CPU lacks something for the second."""
    return pytest.param(one, other, marks=variants([other])[0].marks, id=f"{one}-{other}")


@pytest.mark.parametrize(
    ("one", "other"), [two_variants("avx2", "avx512"), two_variants("avx512_bf16", "avx512_bf16_fma")]
)
def test_same_bits(one, other, process_of):
    """doc/kernels.md: AVX2 and AVX512 on fp32 activations; VDPBF16PS and the FMA in its place on Intel."""
    done, wider = (digests("FORMATS", 300, 170, 1, 40, **process_of(v)) for v in (one, other))
    assert len(done) > 50
    assert done == wider


# hidden, intermediate, numbers of tokens; what traps get through, one and two tiles of tokens and columns
# that end within a step; and what an emulator gets through.
INT8_SIZES = (430, 330, 1, 2, 5, 19, 60)
TRAPPED_INT8_SIZES = (600, 100, 1, 11, 60)
SMALL_INT8_SIZES = (170, 100, 1, 11)


@pytest.fixture(scope="module")
def digests_here() -> dict[tuple[int, ...], list[str]]:
    return {
        sizes: digests("INT8_PATHS", *sizes) for sizes in (INT8_SIZES, TRAPPED_INT8_SIZES, SMALL_INT8_SIZES)
    }


@pytest.mark.parametrize("variant", variants(VARIANTS))
def test_int8_activations_give_the_same_bits(variant, digests_here, process_of):
    """doc/kernels.md: on every instruction set."""
    variables = process_of(variant)
    sizes = TRAPPED_INT8_SIZES if "LD_PRELOAD" in variables else INT8_SIZES
    found = digests("INT8_PATHS", *sizes, **variables)
    assert len(set(found)) == len(INT8_PATHS) * len(sizes[2:])
    assert found == digests_here[sizes]


def test_int8_activations_give_the_same_bits_on_haswell(digests_here):
    found = digests("INT8_PATHS", *SMALL_INT8_SIZES, KT_TEST_EMULATED_CPU="Haswell")
    assert found == digests_here[SMALL_INT8_SIZES]


GGUF_DIGESTS = "import test_gguf_panels; print(*test_gguf_panels.digests(), sep='\\n')"


def gguf_digests(**environment: str) -> list[str]:
    done = python("-c", GGUF_DIGESTS, **environment)
    assert done.returncode == 0, done.stdout
    return [line for line in done.stdout.splitlines() if not line.startswith("qemu")]


@pytest.fixture(scope="module")
def gguf_digests_here() -> list[str]:
    return gguf_digests()


@pytest.mark.parametrize("variant", variants(["avx2", "avx_vnni", "avx512", "avx512_vnni", "amx"]))
def test_types_of_gguf_files_give_the_same_bits(variant, gguf_digests_here, process_of):
    found = gguf_digests(**process_of(variant))
    assert len(set(found)) > 3 * len(PANEL_TYPES)
    assert found == gguf_digests_here


def test_types_of_gguf_files_give_the_same_bits_on_haswell(gguf_digests_here):
    assert gguf_digests(KT_TEST_EMULATED_CPU="Haswell") == gguf_digests_here


def run_arithmetic(*options: str, **environment: str):
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", *options, *ARITHMETIC]
    return python(*command, timeout=1800, **environment)


def passed(report: str) -> int:
    found = re.search(r"(\d+) passed", report)
    return int(found[1]) if found else 0
