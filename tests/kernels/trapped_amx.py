"""AMX on a CPU without it: what runs the extension's AMX machine code as it was built (trapped_amx/trap.cc).

    environment = trapped_amx.environment(folder)      of a process in which AMX instructions are trapped
    python("-c", program, **environment)
    trapped_amx.package_environment(folder)            whose `kt_kernel` is that extension's, too

The product knows nothing of it, so no variable that a user may set makes it believe in AMX. Two things are
different in such a process: a library is preloaded that runs the instructions which raise SIGILL, and the
extension is a copy in which the first byte of each CPUID and XGETBV is one that traps too, so that the
library can answer that there are tiles. All other bytes, those of the kernels included, are as installed.

The CPU must have AVX512-BF16: everything but the tiles runs on it. To the extension it is a Sapphire Rapids
without AVX-VNNI, which also says that FMA beats VDPBF16PS there.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from extension import ext
from tools import tool

SOURCES = Path(__file__).parent / "trapped_amx"
FEATURES = {"amx_tile", "amx_bf16", "amx_int8"}
NEEDS = {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "avx512_bf16"}
QUESTIONS = {"cpuid": b"\x0f\xa2", "xgetbv": b"\x0f\x01\xd0"}
TRAP = b"\x27"  # in place of 0f

_SECTION = re.compile(r"^\s*\d+ \.text\s+\w+\s+(\w+)\s+\w+\s+(\w+)", re.MULTILINE)
_INSTRUCTION = re.compile(r"^\s*([0-9a-f]+):\t(cpuid|xgetbv)\b", re.MULTILINE)


def detected() -> set[str]:
    return set(ext.cpu_features()["detected"])


def not_here() -> str:
    """Why this CPU gets no trapped AMX; empty when it does."""
    own = detected()
    if own >= FEATURES:
        return "AMX in a process that traps it: this CPU has it itself"
    if lacking := NEEDS - own:
        return f"NOT RUN: AMX, trapped: this CPU lacks {', '.join(sorted(lacking))}"
    return ""


def seen() -> set[str]:
    """Features that the extension detects in such a process, or natively where there is none."""
    own = detected()
    if not_here():
        return own
    return own | FEATURES | ({"fma_beats_dot"} if "avx512_vbmi" in own else set())


def compiled(library: Path, *sources: str, flags: tuple[str, ...]) -> Path:
    """A shared library of C++ files of trapped_amx/."""
    command = [tool("c++", "g++", "clang++"), "-std=c++17", "-shared", "-fPIC", "-Wall", "-Wextra", *flags]
    subprocess.run([*command, "-o", library, *(SOURCES / name for name in sources), "-ldl"], check=True)
    return library


def trapping_copy(extension: Path, copy: Path) -> Path:
    """The extension with its questions to the CPU replaced by instructions that trap."""
    headers = _objdump("--section-headers", "--wide", str(extension))
    address, offset = (int(number, 16) for number in _SECTION.search(headers).groups())
    content = bytearray(extension.read_bytes())
    listing = _objdump("--disassemble", "--section=.text", "--no-show-raw-insn", str(extension))
    for place, name in _INSTRUCTION.findall(listing):
        at = int(place, 16) - address + offset
        assert content[at : at + len(QUESTIONS[name])] == QUESTIONS[name], f"no {name} at {place}"
        content[at : at + 1] = TRAP
    copy.write_bytes(content)
    return copy


def _objdump(*arguments: str) -> str:
    return subprocess.run([tool("objdump"), *arguments], check=True, stdout=subprocess.PIPE, text=True).stdout


def environment(folder: Path) -> dict[str, str]:
    """Variables for a process under the trap; what they name is built in `folder`."""
    # Sums must round as they are written, and MXCSR is set for them: no contraction, nothing assumed.
    flags = ("-O3", "-mavx2", "-mfma", "-ffp-contract=off", "-fno-math-errno", "-ftls-model=initial-exec")
    sources = ("trap.cc", "instruction.cc", "tiles.cc")
    return {
        "LD_PRELOAD": str(compiled(folder / "trap.so", *sources, flags=flags)),
        "KT_TEST_EXTENSION": str(trapping_copy(Path(ext.__file__), folder / "kt_kernel_ext.so")),
        "KT_TEST_TRAPPED_AMX": "1",
    }


# Python runs it before anything else; the interpreter's own path comes later.
_USE_THE_COPY = """
import importlib.util, os, sys

class CopyOfTheExtension:
    def find_spec(self, name, path=None, target=None):
        if name == "kt_kernel.kt_kernel_ext":
            return importlib.util.spec_from_file_location(name, os.environ["KT_TEST_EXTENSION"])

sys.meta_path.insert(0, CopyOfTheExtension())
"""


def package_environment(folder: Path) -> dict[str, str]:
    """As environment(), for programs that import the package."""
    hook = folder / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(_USE_THE_COPY)
    return environment(folder) | {"PYTHONPATH": str(hook)}
