"""Counts in the machine code of the AMX kernels what sets their pace (doc/kernels.md).

    python scripts/amx_counts.py [FOLDER]     of object files; default: this checkout's build

For each object, of the loop that multiplies a block of 32 tokens and of the loops around it:

    products a load     tile products for each tile load; the exit status is 1 where it is less than 1, what a
                        block of 2 x 2 tiles has
    products a KiB      of B tiles, for 32 tokens: what is decoded or loaded serves so many products
    decoding            vector instructions for a KiB of decoded B tiles (none where panels are B tiles)
    adding              vector instructions for a line of 16 sums, in the innermost loop that adds them
"""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LEAST_PRODUCTS_A_LOAD = 1.0
_LINE_BYTES = 64
_TILE_BYTES = 1024
_B_TILES = ("%tmm6", "%tmm7")

_OF_TILES = re.compile(r"TileGemm|DecodedTiles|4gemm|multiply")
_FUNCTION = re.compile(r"^[0-9a-f]+ <(.*)>:$")
_INSTRUCTION = re.compile(r"^\s*([0-9a-f]+):\t(?:\{\w+\} )?(\S+)\s*(.*)$")


@dataclass(frozen=True)
class Instruction:
    address: int
    name: str
    operands: str

    @property
    def target(self) -> int | None:
        """Where a jump goes."""
        match = re.match(r"([0-9a-f]+)\b", self.operands) if self.name.startswith("j") else None
        return int(match[1], 16) if match else None

    @property
    def is_arithmetic(self) -> bool:
        return "%zmm" in self.operands and not re.match(r"vmov(dq|up|ap)", self.name)

    def stores(self, name: str) -> bool:
        return re.match(name, self.name) is not None and re.match(r"%zmm\d+,.*\(", self.operands) is not None


Loop = list[Instruction]


@dataclass(frozen=True)
class Counts:
    products_a_load: float
    products_a_kib: float
    decoding: float | None
    adding: float | None


def functions(listing: str) -> list[Loop]:
    """The instructions of each function for tiles in an objdump listing without raw bytes.

    Objects for int8 activations also hold what multiplies few tokens.
    """
    found: list[Loop] = []
    for line in listing.splitlines():
        if match := _FUNCTION.match(line):
            wanted = _OF_TILES.search(match[1]) is not None
            found.append([])
        elif (match := _INSTRUCTION.match(line)) and found and wanted:
            found[-1].append(Instruction(int(match[1], 16), match[2], match[3]))
    return [function for function in found if function]


def innermost_loops(function: Loop) -> list[Loop]:
    """Between a jump backwards and its target, without another such loop in between."""
    spans = {
        (i.target, i.address)
        for i in function
        if i.target is not None and function[0].address <= i.target <= i.address
    }
    inner = [s for s in spans if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
    return [[i for i in function if first <= i.address <= last] for first, last in inner]


def _products(loop: Loop) -> int:
    return sum(i.name.startswith("tdp") for i in loop)


def _tile_loops(function: Loop) -> list[Loop]:
    """Stretches that are repeated and hold products; prefetching may be a loop inside of them."""
    spans = [
        [j for j in function if i.target <= j.address <= i.address]
        for i in function
        if i.target is not None and function[0].address <= i.target <= i.address
    ]
    return [loop for loop in spans if _products(loop)]


def counts(listing: str) -> Counts:
    """Of one object file that holds a loop with four products."""
    parts = functions(listing)
    tiles = min((loop for part in parts for loop in _tile_loops(part) if _products(loop) == 4), key=len)
    loads = [i for i in tiles if i.name.startswith("tileload")]
    of_b = [i for i in loads if i.operands.endswith(_B_TILES)]
    loops = [loop for part in parts for loop in innermost_loops(part)]
    decoding = [
        sum(i.is_arithmetic for i in loop) / stores * (_TILE_BYTES / _LINE_BYTES)
        for loop in loops
        if (stores := sum(i.stores("vmovdqa(32|64)") for i in loop))
    ]
    adding = [
        sum(i.is_arithmetic for i in loop)
        for loop in loops
        if any(i.name.startswith("vfmadd") for i in loop) and not any(i.stores("vmov") for i in loop)
    ]
    return Counts(
        _products(tiles) / len(loads),
        _products(tiles) / len(of_b),
        min(decoding, default=None),
        min(adding, default=None),
    )


def listing_of(path: Path) -> str:
    command = ["objdump", "--disassemble", "--no-show-raw-insn", "--wide", str(path)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def main(arguments: list[str]) -> int:
    folder = Path(arguments[0]) if arguments else ROOT / "build"
    objects = sorted(folder.rglob("kernels/amx/*.o"))
    if not objects:
        print(f"{folder} holds no kernels/amx/*.o: build first, ./install.sh build")
        return 1
    print(f"{'object':16} products a load  a KiB  decoding  adding")
    status = 0
    for path in objects:
        found = counts(listing_of(path))
        status |= found.products_a_load < LEAST_PRODUCTS_A_LOAD
        numbers = ["-" if n is None else f"{n:g}" for n in (found.decoding, found.adding)]
        print(
            f"{path.name.partition('.')[0]:16} {found.products_a_load:15.2f} {found.products_a_kib:6.1f} "
            f"{numbers[0]:>9} {numbers[1]:>7}"
        )
    return int(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
