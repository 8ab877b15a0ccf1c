"""The published peer's layer for fine-tuning, in a process of its own: its package has the name of ours.

    python -S training_peer_worker.py PACKAGES SITE METHOD MOST_TOKENS RANK THREADS FOLDER SHAPES_FILE

PACKAGES: the folder with the peer's wheel; SITE: one with torch; FOLDER: for files that it needs. Each line
of its input, "tokens seed", is a call; it answers "forward_ms backward_ms". Without a GPU nothing can be
pinned, so that is left out where it asks for it.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

PACKAGES, SITE, METHOD, MOST_TOKENS, RANK, THREADS, FOLDER, SHAPES_FILE = sys.argv[1:]
sys.path[:0] = [PACKAGES, SITE]
ANSWERS = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what its libraries print

import torch  # noqa: E402

GROUP = 32  # of RAWINT4, the only one it trains


def without_pinning(make: Any) -> Any:
    return lambda *sizes, pin_memory=False, **options: make(*sizes, **options)


torch.empty, torch.zeros = without_pinning(torch.empty), without_pinning(torch.zeros)

from kt_kernel import KTMoEWrapper  # noqa: E402


def shapes() -> ModuleType:
    spec = importlib.util.spec_from_file_location("shapes", SHAPES_FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["shapes"] = module
    spec.loader.exec_module(module)
    return module


SHAPES = shapes()
SHAPE = SHAPES.SHAPES["S"]


def wrapper(method: str, **options: Any) -> Any:
    return KTMoEWrapper(
        layer_idx=0,
        num_experts=SHAPE.experts,
        num_experts_per_tok=SHAPE.top_k,
        hidden_size=SHAPE.hidden,
        moe_intermediate_size=SHAPE.intermediate,
        gpu_experts_mask=torch.zeros(SHAPE.experts, dtype=torch.bool),
        cpuinfer_threads=int(THREADS),
        threadpool_count=1,
        weight_path=FOLDER,
        chunked_prefill_size=int(MOST_TOKENS),
        method=method,
        **options,
    )


def matrices() -> list[torch.Tensor]:
    """bf16 gate, up, down of one expert in every slot."""
    generator = torch.Generator().manual_seed(1)
    h, i = SHAPE.hidden, SHAPE.intermediate
    sizes = ((i, h), (i, h), (h, i))
    each = [(torch.randn(n, k, generator=generator) * k**-0.5).bfloat16() for n, k in sizes]
    return [matrix.repeat(SHAPE.experts, 1, 1) for matrix in each]


def in_nibbles(matrix: torch.Tensor) -> list[torch.Tensor]:
    """Codes, two a byte, and bf16 scales of groups of 32 columns."""
    groups = matrix[0].float().unflatten(-1, (-1, GROUP))
    scales = groups.abs().amax(-1) / 7
    codes = (groups / scales[..., None]).round().clamp(-8, 7).to(torch.int8).flatten(-2) & 15
    pairs = codes.to(torch.uint8).unflatten(-1, (-1, 2))
    packed = pairs[..., 0] | pairs[..., 1] << 4
    return [t.repeat(SHAPE.experts, 1, 1) for t in (packed, scales.bfloat16())]


def load(layer: Any) -> None:
    slots = torch.arange(SHAPE.experts)
    if METHOD == "RAWINT4_SFT":
        from kt_kernel.sft.weights import RAWINT4ExpertWeights

        parts = [part for matrix in matrices() for part in in_nibbles(matrix)]
        layer.load_rawint4_weights(RAWINT4ExpertWeights(*parts), slots)
    elif METHOD == "AMXINT8_SFT":
        layer.share_backward_bb = True
        if not any(Path(FOLDER).iterdir()):  # by its own conversion
            wrapper("AMXINT8", cpu_save=True).load_weights_from_tensors(*matrices(), slots)
            os._exit(0)
        layer.load_weights(slots)
    else:
        layer.load_weights_from_tensors(*matrices(), slots)


def add_lora(layer: Any) -> None:
    e, h, i, r = SHAPE.experts, SHAPE.hidden, SHAPE.intermediate, int(RANK)
    sizes = ((e, r, h), (e, i, r), (e, r, h), (e, i, r), (e, r, i), (e, h, r))
    weights = [(torch.randn(*s) * s[-1] ** -0.5).bfloat16() for s in sizes]
    layer.init_lora_weights(*weights, *(torch.zeros(*s, dtype=torch.bfloat16) for s in sizes))


def main() -> None:
    options = {"lora_rank": int(RANK), "lora_alpha": 2.0 * int(RANK), "max_cache_depth": 1}
    layer = wrapper(METHOD, mode="sft", **options)
    load(layer)
    add_lora(layer)
    print("ready", file=ANSWERS, flush=True)
    for line in sys.stdin:
        tokens, seed = map(int, line.split())
        call = SHAPES.random_call(SHAPE, tokens, seed)
        dout = torch.randn(tokens, SHAPE.hidden).bfloat16()
        begin = time.perf_counter()
        layer.forward(call.hidden, call.ids, call.weights, save_for_backward=True)
        middle = time.perf_counter()
        layer.backward(dout)
        end = time.perf_counter()
        print(1e3 * (middle - begin), 1e3 * (end - middle), file=ANSWERS, flush=True)


if __name__ == "__main__":
    main()
