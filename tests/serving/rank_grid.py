"""Do several ranks, stages and hosts say what one rank says, in every format and with every placement?

    .venv/bin/python tests/serving/rank_grid.py                     # 27 cells, 36 servers
    .venv/bin/python tests/serving/rank_grid.py --format FP8 --device-experts 5 --way "two hosts"

Greedy answers to six prompts, compared with those of one rank with the same options. Sums in another order
may part where two tokens are nearly as probable: what is printed then is by how much the first was ahead.
Exit status 1 if an answer parts where it was further ahead than a tie. test_several_ranks.py has some cells.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tiny_models
import tiny_quantised
from answers import Answer, greedy
from server import Server, free_port, kt_options, serving
from texts import ENGLISH
from two_hosts import FIRST, TwoHosts, two_hosts

OPTIONS = ("--dtype", "float32", "--max-total-tokens", "4096", "--kt-activations", "bf16")
PROMPTS = tuple(ENGLISH[start : start + 40 + 97 * start % 200] for start in range(0, 600, 100))
TOKENS = 24
# Of log-probability. These models are random: their best two tokens are 0.3 apart in the middle.
TIE = 0.01

# Format of the experts -> the layout of a published model that has it; plain weights have none.
LAYOUTS = {"BF16": None, "FP8": "deepseek-v3", "RAWINT4": "kimi-k2-thinking"}
DEVICE_EXPERTS = (0, 5, 16)  # none, some and all
WAYS = {"two ranks": ("--tp-size", "2"), "two stages": ("--pp-size", "2"), "two hosts": ("--tp-size", "2")}


@dataclass(frozen=True)
class Compared:
    """`parts`: of the answers that differ, by how much the token that was not chosen had been ahead."""

    answers: int
    parts: tuple[float, ...]

    def __str__(self) -> str:
        parted = "".join(f", {margin:.4f}" for margin in self.parts)
        return f"{self.answers - len(self.parts)} of {self.answers} equal" + parted

    def only_ties(self) -> bool:
        return all(margin < TIE for margin in self.parts)


def compared(alone: list[Answer], answers: list[Answer]) -> Compared:
    parts = []
    for expected, answer in zip(alone, answers, strict=True):
        assert len(expected.tokens) == len(answer.tokens) == TOKENS
        pairs = zip(expected.tokens, answer.tokens, strict=True)
        parts += [expected.margins[i] for i, (one, other) in enumerate(pairs) if one != other][:1]
    return Compared(len(alone), tuple(parts))


def checkpoint(format_name: str, folder: Path) -> Path:
    """What is served, made there."""
    layout = LAYOUTS[format_name]
    if layout is None:
        return tiny_models.build("qwen3_moe", folder / format_name)
    return tiny_quantised.build(layout, folder / format_name) / "served"


def answers(server: Server) -> list[Answer]:
    return [greedy(server, prompt, TOKENS) for prompt in PROMPTS]


@contextlib.contextmanager
def on_two_hosts(
    model: Path, folder: Path, hosts: TwoHosts, *options: str
) -> Iterator[tuple[Server, Server]]:
    """The first answers requests."""
    together = [*options, "--nnodes", "2", "--dist-init-addr", f"{FIRST}:{free_port()}"]
    second = Server(model, folder / "second.log", [*together, "--node-rank", "1"], inside=hosts.second)
    try:
        together += ["--node-rank", "0"]
        with serving(model, folder / "first.log", *together, inside=hosts.first) as first:
            yield first, second
    finally:
        second.stop()


def served(model: Path, folder: Path, device_experts: int, way: str | None) -> list[Answer]:
    """The answers of a server that is started so; None: on one rank."""
    options = (*kt_options(model, device_experts), *OPTIONS, *WAYS.get(way, ()))
    if way != "two hosts":
        with serving(model, folder / "log", *options) as server:
            return answers(server)
    with two_hosts(folder) as hosts, on_two_hosts(model, folder, hosts, *options) as (first, _):
        return answers(first)


def _cell(model: Path, folder: Path, device_experts: int, way: str, alone: list[Answer]) -> Compared | str:
    """What is printed of it; a sentence where the servers did not answer."""
    try:
        return compared(alone, served(model, folder, device_experts, way))
    except (AssertionError, OSError) as error:
        return f"no answer: {str(error).splitlines()[0]}"


def main() -> int:
    """Prints a line for each cell."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--format", choices=LAYOUTS)
    parser.add_argument("--device-experts", type=int, choices=DEVICE_EXPERTS)
    parser.add_argument("--way", choices=WAYS)
    chosen = parser.parse_args()
    held = True
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for format_name in LAYOUTS if chosen.format is None else (chosen.format,):
            model = checkpoint(format_name, folder)
            for count in DEVICE_EXPERTS if chosen.device_experts is None else (chosen.device_experts,):
                alone = served(model, folder, count, None)
                for way in WAYS if chosen.way is None else (chosen.way,):
                    cell = _cell(model, folder, count, way, alone)
                    held = held and isinstance(cell, Compared) and cell.only_ties()
                    print(f"| {format_name} | {count} of 16 | {way} | {cell} |", flush=True)
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
