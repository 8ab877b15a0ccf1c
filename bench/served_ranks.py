"""Decoding on two ranks of one machine, whole servers: each rank with half of every expert and half of the
cores, against rank 0 with all of both.

    .venv/bin/python bench/served_ranks.py

Two servers with --tp-size 2, of which the one that is not asked stands still (SIGSTOP): SGLang's processes
use their cores while they wait. Asked in turn; prints the middle and the least of each, and the middle of the
ratios. The model is random, of Qwen3-MoE's shape (bench/random_moe.py), with 0.6 GB of experts.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from random_moe import Size, write_checkpoint
from served_model import ServedModel, started

_MODEL = Size(2048, 768, 16, 8, layers=4, heads=16, kv_heads=4, head_dim=128, vocabulary=4096)
_OPTIONS = (
    "--tp-size",
    "2",
    "--max-total-tokens",
    "4096",
    "--kt-method",
    "BF16",
    "--kt-num-gpu-experts",
    "0",
)
_WAYS = {"rank 0 alone": "first", "both": "auto"}
_PROMPT, _TOKENS = 16, 32


class StandingServer:
    """Works while a block of `working` runs, and stands still otherwise."""

    def __init__(self, url: str, group: int) -> None:
        self._model = ServedModel(url, _MODEL.vocabulary)
        self._group = group
        os.killpg(group, signal.SIGSTOP)

    @contextlib.contextmanager
    def working(self) -> Iterator[ServedModel]:
        os.killpg(self._group, signal.SIGCONT)
        try:
            self._model.generate(_PROMPT, 2, seed=1000)  # caches and clocks are warm again
            yield self._model
        finally:
            os.killpg(self._group, signal.SIGSTOP)

    def end(self) -> None:
        os.killpg(self._group, signal.SIGCONT)


def main() -> None:
    """Prints a line for each server and one for their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=8)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        model = Path(name) / "model"
        write_checkpoint(model, _MODEL, torch.device("cpu"))
        servers = {way: _server(stack, model, ranks) for way, ranks in _WAYS.items()}
        seconds: dict[str, list[float]] = {way: [] for way in _WAYS}
        for turn in range(rounds):
            for way in [*_WAYS][:: 1 - 2 * (turn % 2)]:
                with servers[way].working() as server:
                    seconds[way].append(server.seconds_per_token(_PROMPT, _TOKENS, seed=turn))
    for way, times in seconds.items():
        middle, least = 1000 * statistics.median(times), 1000 * min(times)
        print(f"{way}: {middle:.2f} ms a token in the middle, least {least:.2f}")
    ratios = [alone / both for alone, both in zip(*seconds.values(), strict=True)]
    middle = statistics.median(ratios)
    print(f"both are {middle:.2f} times as fast in the middle ({min(ratios):.2f} to {max(ratios):.2f})")


def _server(stack: contextlib.ExitStack, model: Path, ranks: str) -> StandingServer:
    options = ["--disable-radix-cache", *_OPTIONS, "--kt-weight-path", str(model), "--kt-cpu-ranks", ranks]
    url, process = stack.enter_context(started(model, options, {}))
    server = StandingServer(url, process.pid)
    stack.callback(server.end)
    return server


if __name__ == "__main__":
    main()
