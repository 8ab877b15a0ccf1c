"""Damages small GGUF files at random and reads them: the reader answers or raises a KTError, and allocates
no more than the file's size.

    python tests/gguf_files/fuzz_reader.py --seconds 600 [--seed 0]    prints how many files were read
    python tests/gguf_files/fuzz_reader.py --only 12345                one file again, by a failure's number

A file's number is the seed of its damage, so a failure is repeated by it alone.
"""

from __future__ import annotations

import argparse
import random
import struct
import tempfile
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from gguf_headers import ARRAY, STRING, U32, Header, Tensor, entry, part, usual

from kt_kernel.errors import KTError
from kt_kernel.gguf.experts import GgufExperts
from kt_kernel.gguf.model import GgufModel

# Python's own objects for a few dozen tensors, and one message.
ALLOWED_BYTES = 256 << 10

_EXTREMES = (0, 1, 2, 127, 128, 255, 256, 65535, 65536, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32)
_EXTREMES_64 = (1 << 40, (1 << 61), (1 << 63) - 1, 1 << 63, (1 << 64) - 8, (1 << 64) - 1)


def _with_vocabulary() -> bytes:
    header = usual()
    words = [f"word{number}" for number in range(300)]
    header.metadata.append(entry("tokenizer.ggml.merges", ARRAY, (STRING, words)))
    return header.bytes()


def _with_many_tensors() -> bytes:
    tensors = [Tensor(f"blk.{layer}.attn_norm.weight", (8,), 0, bytes(32)) for layer in range(40)]
    return Header(tensors=tensors, metadata=[entry("general.alignment", U32, 64)], alignment=64).bytes()


def _with_experts() -> bytes:
    q4_0, rows, experts = 2, 32, 2
    tensors = [
        Tensor(f"blk.0.ffn_{name}_exps.weight", (32, rows, experts), q4_0, bytes(18 * rows * experts))
        for name in ("gate", "up", "down")
    ]
    tensors.append(Tensor("blk.0.ffn_down_exps.bias", (rows, experts), 0, bytes(4 * rows * experts)))
    tensors += [
        Tensor(f"blk.1.ffn_{name}.{expert}.weight", (32, rows), q4_0, bytes(18 * rows))
        for name in ("gate", "up", "down")
        for expert in range(experts)
    ]
    return Header(tensors=tensors).bytes()


def _parts() -> list[bytes]:
    first, second = (
        part(number, 2, [Tensor(f"{number}", (8,), 0, bytes(32))], 2, entry("a", U32, 1)) for number in (0, 1)
    )
    return [first.bytes(), second.bytes()]


_WHOLE = (usual().bytes(), Header().bytes(), _with_vocabulary(), _with_many_tensors(), _with_experts())
_PARTS = _parts()


# ---- damage ----------------------------------------------------------------------------------------------


def _flip_bits(data: bytearray, chance: random.Random) -> None:
    for _ in range(chance.choice((1, 1, 2, 8))):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)


def _set_number(data: bytearray, chance: random.Random) -> None:
    """Counts, lengths, kinds and extents are 4 or 8 bytes somewhere in the header."""
    letter = chance.choice("IQ")
    at = chance.choice((4, 8, 16, chance.randrange(len(data)), chance.randrange(len(data))))
    extremes = (*_EXTREMES, *_EXTREMES_64) if letter == "Q" else _EXTREMES[:-1]
    number = struct.pack("<" + letter, chance.choice(extremes))
    data[at : at + len(number)] = number[: max(0, len(data) - at)]


def _cut_off(data: bytearray, chance: random.Random) -> None:
    del data[chance.randrange(len(data)) :]


def _cut_out(data: bytearray, chance: random.Random) -> None:
    at = chance.randrange(len(data))
    del data[at : at + chance.choice((1, 4, 8, 64))]


def _repeat(data: bytearray, chance: random.Random) -> None:
    at = chance.randrange(len(data))
    data[at:at] = data[at : at + chance.choice((1, 8, 32, 256))]


def _splice(data: bytearray, chance: random.Random) -> None:
    """A piece of another file."""
    other = chance.choice((*_WHOLE, *_PARTS))
    at, begin = chance.randrange(len(data)), chance.randrange(len(other))
    piece = other[begin : begin + chance.choice((8, 32, 128, 1024))]
    data[at : at + len(piece)] = piece


def _overwrite(data: bytearray, chance: random.Random) -> None:
    at = chance.randrange(len(data))
    piece = chance.randbytes(chance.choice((1, 4, 16)))
    data[at : at + len(piece)] = piece


_DAMAGES: tuple[Callable[[bytearray, random.Random], None], ...] = (
    _flip_bits,
    _set_number,
    _set_number,
    _cut_off,
    _cut_out,
    _repeat,
    _splice,
    _overwrite,
)


def damaged_files(number: int) -> list[bytes]:
    """One file, or the two parts of a model, at least one of them damaged."""
    chance = random.Random(number)
    files = list(_PARTS) if chance.random() < 0.2 else [chance.choice(_WHOLE)]
    at = chance.randrange(len(files))
    data = bytearray(files[at])
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        if data:
            chance.choice(_DAMAGES)(data, chance)
    files[at] = bytes(data)
    return files


# ---- reading ---------------------------------------------------------------------------------------------


def read_everything(path: Path) -> str:
    """Every value and the ends of every tensor; returns how it went."""
    try:
        model = GgufModel(str(path))
        for key in model.metadata:
            value = model.metadata[key]
            if not isinstance(value, str | int | float):
                assert len(list(value)) == len(value) and (not len(value) or value[-1] == list(value)[-1])
        for name, info in model.tensors.items():
            view = model.view(name)
            assert view.numel() == info.bytes
            assert int(view.reshape(-1)[-1]) >= 0  # a place outside the file would end the process
        model.drop_pages(model.tensors)
        experts = GgufExperts(model)
        for layer in experts.layer_bytes():
            with suppress(KTError):
                experts.views(layer, "LLAMAFILE", num_experts=2, hidden=32, intermediate=32)
        _ = model.architecture
    except KTError as error:
        message = str(error)
        assert message and "\n" not in message, message
        return type(error).__name__
    return "read"


def check_file(number: int, directory: Path) -> str:
    """Read the damaged files of that number; raises AssertionError, or whatever the reader lets through."""
    files = damaged_files(number)
    names = ["model.gguf"] if len(files) == 1 else ["model-00001-of-00002.gguf", "model-00002-of-00002.gguf"]
    for name, data in zip(names, files, strict=True):
        (directory / name).write_bytes(data)
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    outcome = read_everything(directory / names[number % len(names)])
    peak = tracemalloc.get_traced_memory()[1] - before
    allowed = sum(map(len, files)) + ALLOWED_BYTES
    assert peak <= allowed, f"{peak} bytes were allocated, expected at most {allowed}"
    return outcome


def run(numbers, directory: Path) -> Counter[str]:
    """How many of these files were read, and how many refused; raises for a failure, with its number."""
    outcomes: Counter[str] = Counter()
    tracemalloc.start()
    try:
        for number in numbers:
            try:
                outcomes[check_file(number, directory)] += 1
            except Exception as error:
                raise AssertionError(
                    f"file {number}: {error!r}; again: fuzz_reader.py --only {number}"
                ) from error
    finally:
        tracemalloc.stop()
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0, help="the first file's number, in thousand millions")
    parser.add_argument("--only", type=int, help="one file's number")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        if options.only is not None:
            print(run([options.only], Path(directory)))
            return
        outcomes: Counter[str] = Counter()
        begin, number = time.monotonic(), options.seed * 10**9
        while time.monotonic() - begin < options.seconds:
            outcomes += run(range(number, number + 1000), Path(directory))
            number += 1000
        print(f"{outcomes.total()} files in {time.monotonic() - begin:.0f} s: {dict(outcomes)}")


if __name__ == "__main__":
    main()
