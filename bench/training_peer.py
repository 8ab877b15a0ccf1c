"""One MoE layer's forward and backward with a LoRA, here and in the published kt-kernel: the same shape,
tokens, experts and rank, on as many threads, in turns within one run.

The peer runs in a process of its own, which is stopped while ours computes. Figures are medians of the rounds
in ms, a ratio theirs / ours, with its range over the rounds: above 1 we are faster. Its LoRA and gradients
are bfloat16, ours float32. It is neither needed nor installed by this package. To have it:

    pip install --no-deps --target DIR kt-kernel==0.7.2
    export KT_SFT_PEER=DIR

    python bench/training_peer.py --threads 2 --tokens 128,1024
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import torch
from training_layer import steps

from kt_kernel.bench.layer import RandomLayer
from kt_kernel.bench.shapes import SHAPES

VARIABLE = "KT_SFT_PEER"
_SETTLE_SECONDS = 0.02
# Our method and the peer's.
CELLS = {"BF16": "AMXBF16_SFT", "AMXINT8": "AMXINT8_SFT", "AMXINT4": "AMXINT4_SFT", "RAWINT4": "RAWINT4_SFT"}


class Peer:
    """The peer's layer; raises RuntimeError if its process ends."""

    def __init__(self, method: str, most_tokens: int, rank: int, threads: int, folder: Path) -> None:
        here = Path(__file__).resolve().parent
        command = [sys.executable, "-S", here / "training_peer_worker.py", os.environ[VARIABLE]]
        command += [Path(torch.__file__).parents[1], method, most_tokens, rank, threads, folder]
        command += [here.parent / "kt_kernel" / "bench" / "shapes.py"]
        arguments = list(map(str, command))
        if method == "AMXINT8_SFT":  # the first process writes its files
            subprocess.run(arguments, stdin=subprocess.DEVNULL, capture_output=True, check=True)
        self._process = subprocess.Popen(
            arguments,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            bufsize=1,
        )
        self._answer()  # raises where the process has ended
        self._process.send_signal(signal.SIGSTOP)

    def run(self, tokens: int, seed: int) -> tuple[float, float]:
        """Milliseconds of a forward and of its backward pass."""
        assert self._process.stdin is not None
        self._process.send_signal(signal.SIGCONT)
        self._process.stdin.write(f"{tokens} {seed}\n")
        forward, backward = map(float, self._answer().split())
        self._process.send_signal(signal.SIGSTOP)
        return forward, backward

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the peer's process ended ({self._process.wait()})")
        return line

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def seconds_of(step: Callable[[int], None], round_: int) -> float:
    time.sleep(_SETTLE_SECONDS)
    begin = time.perf_counter()
    step(round_)
    return time.perf_counter() - begin


def compare(layer: RandomLayer, peer: Peer, tokens: int, rank: int, rounds: int) -> str:
    timed = steps(layer, layer.shape, tokens, rank)
    ours: list[float] = []
    theirs: list[float] = []
    their_forwards: list[float] = []
    for round_ in range(-1, rounds):
        forward, backward = peer.run(tokens, round_ % 4)
        both = 1e3 * seconds_of(timed["both"], round_)
        if round_ >= 0:
            ours.append(both)
            theirs.append(forward + backward)
            their_forwards.append(forward)
    ratios = [a / b for a, b in zip(theirs, ours, strict=True)]
    return (
        f"{layer.method:8} {tokens:5} tokens  ours {statistics.median(ours):7.1f} ms  "
        f"peer {statistics.median(theirs):7.1f} ms (forward {statistics.median(their_forwards):7.1f})  "
        f"theirs/ours {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--method", action="append", choices=CELLS)
    parser.add_argument("--tokens", default="128,1024")
    parser.add_argument("--rank", type=int, default=8, help="RAWINT4: the peer has 8 only")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if VARIABLE not in os.environ:
        parser.error(f"{VARIABLE} is not set; it names the folder with the peer's packages")
    tokens = [int(count) for count in options.tokens.split(",")]
    shape = SHAPES["S"]
    for method in options.method or CELLS:
        with tempfile.TemporaryDirectory() as folder:
            peer = Peer(CELLS[method], max(tokens), options.rank, options.threads, Path(folder))
            with closing(peer):
                layer = RandomLayer(method, shape, threads=options.threads, max_tokens=max(tokens))
                for count in tokens:
                    print(compare(layer, peer, count, options.rank, options.rounds), flush=True)
                del layer


if __name__ == "__main__":
    main()
