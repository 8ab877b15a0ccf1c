"""Risk: a token's result depends on its neighbours, on the number of threads or on the instruction set.

All of these operators promise the same bits in every case.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from native_and_twin import native, numbers, same

from kt_kernel import kt_kernel_ext

EPS = 1e-6
TOKENS = 301  # more than one piece for each operator


def row_operators(dtype: torch.dtype) -> dict[str, Callable[..., list[torch.Tensor]]]:
    """name -> function(threads, first token, last token) -> results of these tokens."""
    hidden, other = numbers(TOKENS, 1000, dtype=dtype, seed=1), numbers(TOKENS, 1000, dtype=dtype, seed=2)
    weight, logits = numbers(1000, dtype=dtype, seed=3), numbers(TOKENS, 250, dtype=dtype, seed=4)
    head_weight, cache = numbers(40, dtype=dtype, seed=5), numbers(TOKENS, 24, dtype=dtype, seed=6)
    positions = torch.arange(TOKENS).flip(0)
    bias = numbers(250, dtype=torch.float32, seed=7, scale=0.1)

    def added(threads: int, rows: slice) -> list[torch.Tensor]:
        x, residual = hidden[rows].clone(), other[rows].clone()
        native("fused_add_rmsnorm_cpu", threads)(x, residual, weight, EPS)
        return [x, residual]

    def normed_and_turned(threads: int, rows: slice) -> list[torch.Tensor]:
        qkv = hidden[rows].clone()
        q, k = qkv[:, :800], qkv[:, 800:960]
        native("fused_qk_norm_rope_cpu", threads)(
            q, k, head_weight, head_weight, EPS, True, positions[rows], cache, 24
        )
        return [qkv]

    def gated(threads: int, rows: slice) -> list[torch.Tensor]:
        x = hidden[rows].clone()
        native("fused_sigmoid_mul_cpu", threads)(x, other[rows])
        return [x]

    def rotary(threads: int, rows: slice) -> list[torch.Tensor]:
        operator = native("rotary_embedding_cpu", threads)
        return list(operator(positions[rows], hidden[rows], other[rows, :200], 40, cache, False))

    def grouped(threads: int, rows: slice) -> list[torch.Tensor]:
        operator = native("biased_grouped_topk_cpu", threads)
        return list(operator(hidden[rows], logits[rows], bias, 8, True, 10, 4, 0, 2.5, None))

    def one(name: str, *arguments) -> Callable[..., list[torch.Tensor]]:
        return lambda threads, rows: [native(name, threads)(hidden[rows], *arguments)]

    return {
        "rmsnorm": one("rmsnorm_cpu", weight, EPS),
        "layernorm": one("layernorm_cpu", weight, weight, EPS),
        "fused_add_rmsnorm": added,
        "fused_qk_norm_rope": normed_and_turned,
        "rotary_embedding": rotary,
        "silu_and_mul": one("silu_and_mul_cpu"),
        "gelu_and_mul": one("gelu_and_mul_cpu"),
        "gelu_tanh_and_mul": one("gelu_tanh_and_mul_cpu"),
        "fused_sigmoid_mul": gated,
        "topk_softmax": lambda threads, rows: list(
            native("topk_softmax_cpu", threads)(hidden[rows], logits[rows], 8, True)
        ),
        "biased_grouped_topk": grouped,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", list(row_operators(torch.float32)))
def test_token_result_does_not_depend_on_neighbours_or_threads(name, dtype):
    operator = row_operators(dtype)[name]
    together = operator(2, slice(0, TOKENS))
    assert same(operator(1, slice(0, TOKENS)), together)
    for token in (0, 7, TOKENS - 1):
        assert same(operator(2, slice(token, token + 1)), [x[token : token + 1] for x in together])
    chunks = [operator(2, slice(begin, min(begin + 128, TOKENS))) for begin in range(0, TOKENS, 128)]
    assert same([torch.cat(parts) for parts in zip(*chunks, strict=True)], together)


def digests() -> dict[str, str]:
    result = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for name, operator in row_operators(dtype).items():
            bits = b"".join(
                x.contiguous().view(torch.uint8).numpy().tobytes() for x in operator(2, slice(0, TOKENS))
            )
            result[f"{name} {dtype}"] = hashlib.sha256(bits).hexdigest()
    return result


def test_every_instruction_set_gives_the_same_bits():
    """KT_KERNEL_CPU_VARIANT is read once per process, so the other tier computes in one of its own."""
    if "avx512f" not in kt_kernel_ext.cpu_features()["active"]:
        pytest.skip("this CPU has one tier only")
    environment = os.environ | {"KT_KERNEL_CPU_VARIANT": "avx2"}
    command = [sys.executable, "-c", "import json, test_rows_alone as t; print(json.dumps(t.digests()))"]
    done = subprocess.run(
        command, cwd=Path(__file__).parent, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == digests()
