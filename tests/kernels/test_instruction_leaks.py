"""Risk: an object file holds an instruction its CPUs lack, and an older machine dies with SIGILL.

The linker can do that as well, when it takes the AVX512 copy of a shared inline function for everybody.

CMake says how each file of the extension is compiled; this test takes the object files of the build in this
checkout, or compiles them the same way where that is out of date, and reads the machine code:
- files without -m flags are plain x86-64: not one VEX or EVEX instruction;
- a kernel file holds nothing beyond the features its row of the dispatch table asks for;
- kernel files define nothing that the linker could merge and run nothing when the extension is loaded.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache, cached_property
from pathlib import Path

import pytest
from extension import ext
from tools import tool

ROOT = Path(__file__).resolve().parents[2]

# Feature names as in dispatch_table(); "other" is in no row and therefore allowed nowhere.
FEATURE_OF_MNEMONIC = [
    (r"v?(ldtilecfg|sttilecfg|tile\w+)", "amx_tile"),
    (r"tdpbf16ps", "amx_bf16"),
    (r"tdpb[su][su]d", "amx_int8"),
    (r"tdp\w+|tcmm\w+", "other"),
    (r"vdpbf16ps|vcvtne2?ps2bf16\w*|vcvtneps2bf16\w*", "avx512_bf16"),
    (r"vpdp(bu|w)\w+", "vnni"),  # avx512_vnni or avx_vnni, by encoding
    (r"vpermb|vperm[it]2b|vpmultishiftqb", "avx512_vbmi"),
    (r"vcvtps2ph|vcvtph2ps", "f16c"),
    (r"vf(n?m(add|sub)|maddsub|msubadd)\w*p[sd]|vfn?m(add|sub)\w*s[sd]", "fma"),
    (r"v\w+(ph|sh)|vcvt\w*ph\w*|vcvt\w*2sh", "other"),  # AVX512-FP16
    (r"vp(compress|expand)[bw]|vpsh[lr]d\w+|vpopcnt\w+|vpshufbitqmb|vpmadd52\w+|vp2intersect\w+", "other"),
    (r"vgf2p8\w+|vaes\w+|vpclmul\w+|vsha\w+|vsm[34]\w+", "other"),
    (r"andn|bextr|bls\w+|bzhi|mulx|pdep|pext|rorx|s[ah][lr]x", "other"),  # BMI: VEX, but general registers
]
_FEATURE_OF_MNEMONIC = [(re.compile(pattern), feature) for pattern, feature in FEATURE_OF_MNEMONIC]

# What each compiler flag allows; AVX512 F, BW, VL and DQ always come together in our rows.
FEATURE_OF_FLAG = {
    "-mavx2": "avx2",
    "-mfma": "fma",
    "-mf16c": "f16c",
    "-mavxvnni": "avx_vnni",
    "-mavx512f": "avx512f",
    "-mavx512bw": "avx512f",
    "-mavx512vl": "avx512f",
    "-mavx512dq": "avx512f",
    "-mavx512vnni": "avx512_vnni",
    "-mavx512bf16": "avx512_bf16",
    "-mavx512vbmi": "avx512_vbmi",
    "-mamx-tile": "amx_tile",
    "-mamx-bf16": "amx_bf16",
    "-mamx-int8": "amx_int8",
}

# Kernels that no layer runs, so that they have no row: what they need is what every CPU that we support has.
BESIDE_LAYERS = {
    "kernels/avx2/quantise.cc": [{"kernel": "quantise", "needs": ["avx2", "fma", "f16c"]}],
    "kernels/avx2/gguf_rows.cc": [{"kernel": "gguf_rows", "needs": ["avx2", "fma", "f16c"]}],
    "kernels/avx2/transpose_codes.cc": [{"kernel": "transpose_codes", "needs": ["avx2", "fma", "f16c"]}],
}
# Kernels of operators.
_TIERS = {
    "avx2": ["avx2", "fma", "f16c"],
    "avx512": ["avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq"],
}
_FAMILIES = (
    *("attention", "decode", "f32", "gated_delta", "gates", "heads", "norms", "router", "rows_exact"),
    *("sampling", "training"),
)
for _family in _FAMILIES:
    for _tier, _needs in _TIERS.items():
        BESIDE_LAYERS[f"kernels/{_tier}/{_family}.cc"] = [{"kernel": f"{_family}.{_tier}", "needs": _needs}]

INSTRUCTION = re.compile(r"^\s*[0-9a-f]+:\t((?:[0-9a-f]{2} )+)\s*(?:\{\w+\} )?(\S*)\s*(.*)$")
# Segment, address-size and lock prefixes may stand before VEX (c4, c5) and EVEX (62); nothing else may.
PREFIXES = {"26", "2e", "36", "3e", "64", "65", "67"}
_LEADING = ("c4", "c5", "62", *PREFIXES)


def needed_feature(code: list[str], mnemonic: str, operands: str) -> str | None:
    """The feature one instruction needs, None for what every x86-64 CPU has."""
    opcode = next((byte for byte in code if byte not in PREFIXES), "")
    if opcode not in ("c4", "c5", "62"):
        return None
    for pattern, feature in _FEATURE_OF_MNEMONIC:
        if pattern.fullmatch(mnemonic):
            if feature == "vnni":
                return "avx512_vnni" if opcode == "62" else "avx_vnni"
            if opcode == "62" and feature in ("f16c", "fma"):
                return "avx512f"
            return feature
    return "avx512f" if opcode == "62" or "%k" in operands else "avx2"


@cache
def dispatch_table() -> list[dict]:
    return ext.dispatch_table()


def features_in(listing: str) -> dict[str, str]:
    """feature -> the first line of an objdump listing that needs it."""
    found: dict[str, str] = {}
    seen: set[tuple[str, str, bool]] = set()
    for line in listing.splitlines():
        # There are millions of lines, and some hundred kinds of what needed_feature looks at.
        fields = line.split("\t", 2)
        if len(fields) < 3 or not fields[1].startswith(_LEADING):
            continue
        kind = (fields[1][:2], fields[2].partition(" ")[0], "%k" in fields[2])
        if kind in seen and fields[1][:2] not in PREFIXES and not kind[1].startswith("{"):
            continue
        seen.add(kind)
        if match := INSTRUCTION.match(line):
            feature = needed_feature(match[1].split(), match[2], match[3])
            if feature:
                found.setdefault(feature, line.strip())
    return found


class Object:
    """One compiled source file of the extension."""

    def __init__(self, source: Path, flags: list[str], path: Path):
        self.name = str(source.relative_to(ROOT / "csrc"))
        self.source = source
        self.flags = [flag for flag in flags if flag.startswith("-m")]
        self.path = path

    @cached_property
    def features(self) -> dict[str, str]:
        """feature -> the first instruction of this file that needs it."""
        return features_in(output_of(tool("objdump"), "--disassemble", "--wide", str(self.path)))

    @cached_property
    def symbols(self) -> list[tuple[str, str]]:
        """(type letter of nm, demangled name) of everything but undefined and local symbols."""
        lines = output_of(
            tool("nm"), "--demangle", "--defined-only", "--extern-only", str(self.path)
        ).splitlines()
        return [tuple(line.split(" ", 2)[1:]) for line in lines if line]

    @cached_property
    def imports(self) -> set[str]:
        lines = output_of(tool("nm"), "--demangle", "--undefined-only", str(self.path)).splitlines()
        return {line.split(maxsplit=1)[1] for line in lines}

    @cached_property
    def kernel_rows(self) -> list[dict]:
        """Rows of the dispatch table whose kernels this file defines: it spells their names."""
        text = self.source.read_text()
        return [row for row in dispatch_table() if f'"{row["kernel"]}"' in text]


def output_of(*command: str, **options) -> str:
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{shlex.join(command)} failed:\n{done.stdout}{done.stderr}"
    return done.stdout


def compile_commands(build: Path) -> list[dict]:
    """How CMake compiles each file, for a fresh release build without flags from the environment."""
    environment = {k: v for k, v in os.environ.items() if k not in ("CXXFLAGS", "CFLAGS")}
    pybind11 = subprocess.run(
        [sys.executable, "-m", "pybind11", "--cmakedir"], capture_output=True, text=True
    )
    where = [f"-Dpybind11_DIR={pybind11.stdout.strip()}"] if pybind11.returncode == 0 else []
    ninja = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja', 'ninja-build')}"]
    settings = [
        "-DCMAKE_BUILD_TYPE=Release",
        "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON",
        f"-DPython_EXECUTABLE={sys.executable}",
    ]
    output_of(tool("cmake"), "-S", str(ROOT), "-B", str(build), *ninja, *settings, *where, env=environment)
    return json.loads((build / "compile_commands.json").read_text())


def of_the_build() -> list[Object] | None:
    """The objects of a release build in this checkout that has nothing left to do, if there is one."""
    for ninja_file in sorted(ROOT.glob("build/*/build.ninja")):
        build = ninja_file.parent
        settings = (build / "CMakeCache.txt").read_text()
        plain = re.search(r"^CMAKE_BUILD_TYPE:\w+=Release$", settings, re.M) and not re.search(
            r"^(CMAKE_CXX_FLAGS|KT_SANITIZE):\w+=.", settings, re.M
        )
        ninja = [tool("ninja", "ninja-build"), "-C", str(build)]
        if plain and "no work to do" in output_of(*ninja, "-n"):
            entries = json.loads(output_of(*ninja, "-t", "compdb"))
            return [
                Object(Path(entry["file"]), shlex.split(entry["command"]), build / entry["output"])
                for entry in entries
                if entry["file"].endswith(".cc")
            ]
    return None


def compiled_here(build: Path) -> list[Object]:
    def compiled(index_and_entry) -> Object:
        index, entry = index_and_entry
        command = shlex.split(entry["command"])
        path = build / f"{index}.o"
        command[command.index("-o") + 1] = str(path)
        result = Object(Path(entry["file"]), command, path)
        output_of(*command, cwd=entry["directory"])
        return result

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compiled, enumerate(compile_commands(build))))


@pytest.fixture(scope="module")
def objects(tmp_path_factory) -> list[Object]:
    return of_the_build() or compiled_here(tmp_path_factory.mktemp("objects"))


def portable(objects: list[Object]) -> list[Object]:
    return [o for o in objects if not o.flags]


def tiered(objects: list[Object]) -> list[Object]:
    return [o for o in objects if o.flags]


def rows_served(o: Object, objects: list[Object]) -> list[dict]:
    """Rows of the dispatch table that run code of this file: its own, and those of files that use it."""
    exports = {name for _, name in o.symbols}
    users = [user for user in objects if user is o or exports & user.imports]
    return [row for user in users for row in user.kernel_rows]


def test_flags_are_known_and_only_kernels_and_peaks_have_any(objects):
    names = {o.name for o in objects}
    assert names == {str(p.relative_to(ROOT / "csrc")) for p in (ROOT / "csrc").rglob("*.cc")}
    for o in tiered(objects):
        assert set(o.flags) <= set(FEATURE_OF_FLAG), f"{o.name} is compiled with {o.flags}"
        assert re.match(r"kernels/\w+/|limits/peaks_", o.name), f"{o.name} has no business with {o.flags}"
    for o in portable(objects):
        assert not re.match(r"kernels/\w+/|limits/peaks_", o.name), f"{o.name} lacks its -m flags"


def test_portable_objects_are_plain_x86_64(objects):
    for o in portable(objects):
        assert o.features == {}, o.name


def test_kernel_objects_hold_nothing_beyond_their_dispatch_row(objects):
    kernels = [o for o in tiered(objects) if o.name.startswith("kernels/")]
    assert {row["kernel"] for o in kernels for row in o.kernel_rows} == {
        row["kernel"] for row in dispatch_table()
    }
    for o in kernels:
        rows = rows_served(o, kernels) or BESIDE_LAYERS.get(o.name)
        assert rows, f"{o.name} serves no row of the dispatch table"
        found = o.features
        for row in rows:
            beyond = {f: line for f, line in found.items() if f not in row["needs"]}
            assert not beyond, f"{o.name} has instructions that {row['kernel']} does not ask for"


def test_tiered_objects_hold_nothing_beyond_their_flags(objects):
    for o in tiered(objects):
        allowed = {FEATURE_OF_FLAG[flag] for flag in o.flags}
        found = o.features
        beyond = {f: line for f, line in found.items() if f not in allowed}
        assert not beyond, f"{o.name} has instructions that {o.flags} do not allow"
        assert found, f"{o.name} uses none of its {o.flags}"


def test_tiered_objects_offer_the_linker_nothing_to_merge(objects):
    for o in tiered(objects):
        symbols = o.symbols
        merged = [name for letter, name in symbols if letter in "WwVvuC"]
        assert not merged, f"{o.name}: the linker may use its copy of {merged[:3]} on any CPU"
        strangers = [name for _, name in symbols if not name.startswith("kt::")]
        assert not strangers, f"{o.name} exports {strangers[:3]}"
        if o.name.startswith("kernels/"):
            # One set of kernels, or what prepares the rows of several sets.
            prepare = [name for _, name in symbols if name.startswith("kt::prepare_")]
            assert prepare == [name for _, name in symbols] or len(symbols) == 1, f"{o.name}: {symbols}"


def test_tiered_objects_run_nothing_at_load_time(objects):
    for o in tiered(objects):
        sections = output_of(tool("objdump"), "--section-headers", "--wide", str(o.path))
        assert not re.search(r"\.(init_array|ctors)", sections), f"{o.name} has a static constructor"


def test_the_reader_of_listings_sees_what_it_should():
    """Negative control: one line per kind of instruction, as objdump prints them."""
    lines = {
        "   0:\t0f 58 c1             \taddps  %xmm1,%xmm0": None,
        "   0:\tf3 0f b8 c1          \tpopcnt %ecx,%eax": None,
        "   0:\tc5 fc 58 c1          \tvaddps %ymm1,%ymm0,%ymm0": "avx2",
        "   0:\tc5 f0 58 c1          \tvaddps %xmm1,%xmm1,%xmm0": "avx2",
        "   0:\tc4 e2 7d 13 06       \tvcvtph2ps (%rsi),%ymm0": "f16c",
        "   0:\tc4 e2 75 b8 c2       \tvfmadd231ps %ymm2,%ymm1,%ymm0": "fma",
        "   0:\t62 f1 7c 48 58 c1    \tvaddps %zmm1,%zmm0,%zmm0": "avx512f",
        "   0:\t62 f2 7d 48 b8 c1    \tvfmadd231ps %zmm1,%zmm0,%zmm0": "avx512f",
        "   0:\tc5 f8 92 c8          \tkmovw  %eax,%k1": "avx512f",
        "   0:\t62 f2 76 48 52 c2    \tvdpbf16ps %zmm2,%zmm1,%zmm0": "avx512_bf16",
        "   0:\t62 f2 75 48 50 c2    \tvpdpbusd %zmm2,%zmm1,%zmm0": "avx512_vnni",
        "   0:\tc4 e2 75 50 c2       \t{vex} vpdpbusd %ymm2,%ymm1,%ymm0": "avx_vnni",
        "   0:\t62 f2 7d 48 8d c1    \tvpermb %zmm1,%zmm0,%zmm0": "avx512_vbmi",
        "   0:\tc4 e2 7b 49 c0       \ttilezero %tmm0": "amx_tile",
        "   0:\tc4 e2 78 49 06       \tldtilecfg (%rsi)": "amx_tile",
        "   0:\tc4 e2 72 5c c2       \ttdpbf16ps %tmm1,%tmm2,%tmm0": "amx_bf16",
        "   0:\tc4 e2 73 5e c2       \ttdpbssd %tmm1,%tmm2,%tmm0": "amx_int8",
        "   0:\tc4 e3 fb f0 c1 07    \trorx   $0x7,%rcx,%rax": "other",
        "   0:\t62 f5 7c 48 58 c1    \tvaddph %zmm1,%zmm0,%zmm0": "other",
        "   0:\t66 0f 1f 84 00 00 00 \tnopw   0x0(%rax,%rax,1)": None,
        "   7:\t00 00 ": None,
    }
    for line, feature in lines.items():
        assert list(features_in(line)) == ([feature] if feature else []), line
