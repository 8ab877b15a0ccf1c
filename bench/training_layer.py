"""Milliseconds of training one MoE layer: forward, and forward + backward with a LoRA on every expert.

`serving` is the layer's forward as inference runs it (the fastest activations), `forward` that of training
with the LoRA and nothing saved, `both` a forward that saves and a backward with the gradients of hidden
states, routing weights and the LoRA; the ratio is both / forward. `without LoRA`: the same two without any.
Calls alternate; figures are medians of the rounds, or with --best the fastest, for a machine that is busy.

    python bench/training_layer.py                  # BF16, AMXINT8, AMXINT4, 1024 tokens, shape S, rank 8
    python bench/training_layer.py --method FP8 --rank 64 --tokens 64,1024 --threads 1
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from kt_kernel import kt_kernel_ext
from kt_kernel.adapters.backend import Call, ExpertLora, Needs
from kt_kernel.adapters.kernel_backend import KernelBackend
from kt_kernel.bench.layer import RandomLayer
from kt_kernel.bench.shapes import SHAPES, Shape, random_call

NOTHING = Needs(x=False, weights=False, lora=False)


def random_lora(shape: Shape, rank: int) -> ExpertLora:
    def random(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes) * sizes[-1] ** -0.5

    e, h, i = shape.experts, shape.hidden, shape.intermediate
    sizes = ((e, rank, h), (e, i, rank), (e, rank, h), (e, i, rank), (e, rank, i), (e, h, rank))
    return ExpertLora(*(random(*s) for s in sizes), scale=2.0)


def steps(layer: RandomLayer, shape: Shape, tokens: int, rank: int) -> dict[str, Callable[[int], None]]:
    """What is timed, by name; each takes the number of the round, which gives it other tokens and experts."""
    backend, lora = KernelBackend(layer), random_lora(shape, rank)
    dout = torch.randn(tokens, shape.hidden).bfloat16()
    calls = [random_call(shape, tokens, seed) for seed in range(4)]

    def of(round_: int, with_lora: ExpertLora | None) -> Call:
        call = calls[round_ % len(calls)]
        return Call(call.hidden, call.ids, call.weights, with_lora)

    def train(round_: int, with_lora: ExpertLora | None, needs: Needs) -> None:
        call = of(round_, with_lora)
        backend.backward(call, backend.forward(call, needs)[1], dout, needs)

    return {
        "serving": lambda i: layer.run(calls[i % len(calls)]),
        "forward": lambda i: backend.forward(of(i, lora), NOTHING),
        "both": lambda i: train(i, lora, Needs(x=True, weights=True, lora=True)),
        "lower": lambda i: train(i, None, Needs(x=True, weights=True, lora=False)),
    }


def milliseconds(timed: dict[str, Callable[[int], None]], rounds: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {name: [] for name in timed}
    for round_ in range(-1, rounds):
        for name, step in timed.items():
            begin = time.perf_counter()
            step(round_)
            if round_ >= 0:  # the first one touches new memory
                found[name].append((time.perf_counter() - begin) * 1e3)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--method", action="append", choices=kt_kernel_ext.METHODS, metavar="METHOD")
    parser.add_argument("--shape", choices=SHAPES, default="S")
    parser.add_argument("--tokens", default="1024")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--threads", type=int, default=0, help="default: one for each core")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--best", action="store_true", help="the fastest rounds instead of the medians")
    options = parser.parse_args()
    shape, middle = SHAPES[options.shape], min if options.best else statistics.median
    tokens = [int(count) for count in options.tokens.split(",")]
    for method in options.method or ["BF16", "AMXINT8", "AMXINT4"]:
        threads = options.threads or torch.get_num_threads()
        layer = RandomLayer(method, shape, threads=threads, max_tokens=max(tokens))
        for count in tokens:
            found = milliseconds(steps(layer, shape, count, options.rank), options.rounds)
            ms = {name: middle(values) for name, values in found.items()}
            print(
                f"{method:15} shape {shape.name} {count:5} tokens rank {options.rank} {threads} threads: "
                f"serving {ms['serving']:7.1f} ms, forward {ms['forward']:7.1f}, both {ms['both']:7.1f} "
                f"({ms['both'] / ms['forward']:.2f} forwards), without LoRA {ms['lower']:7.1f}",
                flush=True,
            )
        del layer


if __name__ == "__main__":
    main()
