"""Risk: a head is multiplied by another head's matrix, or a norm, an angle or a factor is left out.

The operators that SGLang's DeepSeek models call, against the layers that they stand for.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from native_and_twin import native, numbers, same, twin

from kt_kernel import kt_kernel_ext

EPS = 1e-6
TOKENS = 37  # more than a block of the kernels for few tokens


@dataclass(frozen=True)
class Model:
    hidden: int
    q_rank: int
    kv_rank: int
    rotary: int
    nope: int
    v: int
    heads: int


# What the tiny test model has, and sizes of which none fills whole panels of 32 rows.
MODELS = (Model(256, 96, 64, 32, 64, 64, 8), Model(96, 40, 80, 16, 48, 24, 3))


def packed(weight: torch.Tensor, threads: int = 2) -> torch.Tensor:
    return native("convert_weight_packed", threads)(weight)


def projection_weights(model: Model) -> list[torch.Tensor]:
    """qkv_a_proj, q_b_proj, w_kc."""
    shapes = (
        (model.q_rank + model.kv_rank + model.rotary, model.hidden),
        (model.heads * (model.nope + model.rotary), model.q_rank),
        (model.heads, model.kv_rank, model.nope),
    )
    return [
        numbers(*shape, dtype=torch.bfloat16, seed=10 + i, scale=shape[-1] ** -0.5)
        for i, shape in enumerate(shapes)
    ]


def projection_rest(model: Model, tokens: torch.Tensor) -> tuple[list, list[int]]:
    """Norms, positions, cache and eps, then the sizes."""
    norms = [numbers(rank, dtype=torch.bfloat16, seed=20 + rank) for rank in (model.q_rank, model.kv_rank)]
    cache = numbers(64, model.rotary, dtype=torch.float32, seed=22)
    return [*norms, (11 * tokens + 5) % 64, cache, EPS], [model.q_rank, model.kv_rank, model.rotary]


QKV_PROJ = "qkv_proj_with_rope_fused_weight"


def projection_arguments(model: Model, tokens: torch.Tensor, dtype: torch.dtype, weights: list) -> list:
    rest, sizes = projection_rest(model, tokens)
    x = numbers(TOKENS, model.hidden, dtype=dtype, seed=1)[tokens]
    no_scales = [False, False, None, None, None, True, None]
    return [x, *weights, *rest, *no_scales, *sizes]


def projected(
    model: Model, tokens: torch.Tensor, dtype: torch.dtype, weights: list, threads: int = 2
) -> list:
    return list(native(QKV_PROJ, threads)(*projection_arguments(model, tokens, dtype, weights)))


def assert_near(actual: torch.Tensor, expected: torch.Tensor, share: float) -> None:
    """Within `share` of the largest number: every rounding on the way may fall to the other side."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    error = (actual.double() - expected.double()).abs().max() / expected.double().abs().max()
    assert error < share, f"off by {error:.2g} of the largest number"


# Inputs of other types are rounded to bfloat16 before they are multiplied.
ROUNDING = {torch.bfloat16: 2**-9, torch.float16: 0.005, torch.float32: 0.005}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("model", MODELS)
def test_projections_are_those_of_single_layers(model, dtype):
    tokens = torch.arange(TOKENS)
    weights = projection_weights(model)
    expected = twin(QKV_PROJ)(*projection_arguments(model, tokens, dtype, weights))
    actual = projected(model, tokens, dtype, [packed(weight) for weight in weights])
    for mine, wanted in zip(actual, expected, strict=True):
        assert_near(mine, wanted, ROUNDING[dtype])


def test_projections_against_float64():
    """Nothing of the twin: absorbed queries times keys are the scores of the heads' own keys."""
    model, tokens = MODELS[0], torch.arange(TOKENS)
    down, up, w_kc = (weight.double() for weight in projection_weights(model))
    (q_norm, kv_norm, positions, cache, _), _ = projection_rest(model, tokens)
    x = numbers(TOKENS, model.hidden, dtype=torch.bfloat16, seed=1).double()
    low = x @ down.T

    def normed(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return rows * (rows.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight.double()

    latent = normed(low[:, model.q_rank : -model.rotary], kv_norm)
    queries = (normed(low[:, : model.q_rank], q_norm) @ up.T).unflatten(-1, (model.heads, -1))
    keys = torch.einsum("tr,hrn->thn", latent, w_kc)
    turn = torch.complex(*cache[positions].double().chunk(2, -1))

    def turned(pairs: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        return torch.view_as_real(torch.view_as_complex(pairs.unflatten(-1, (-1, 2))) * by).flatten(-2)

    q_rope = turned(queries[..., model.nope :].contiguous(), turn[:, None])
    k_rope = turned(low[:, -model.rotary :].contiguous(), turn)
    scores = torch.einsum("thn,shn->hts", queries[..., : model.nope], keys)
    scores += torch.einsum("thr,sr->hts", q_rope, k_rope)
    q, k, v = projected(
        model, tokens, torch.bfloat16, [packed(weight) for weight in projection_weights(model)]
    )
    assert same(v, k[..., : model.kv_rank].contiguous())
    actual = torch.einsum("thc,sc->hts", q.double(), k[:, 0].double())
    assert_near(actual, scores, 0.02)


@pytest.mark.parametrize("model", MODELS)
def test_values_of_every_head_go_through_its_own_matrix(model):
    """Layouts as SGLang has them: out [M, B, N] and mat1 [M, B, K], both seen as [B, M, ..]."""
    weight = numbers(model.heads, model.v, model.kv_rank, dtype=torch.bfloat16, seed=30)
    x = numbers(TOKENS, model.heads, model.kv_rank, dtype=torch.bfloat16, seed=31)
    out = torch.full((TOKENS, model.heads, model.v), torch.nan, dtype=torch.bfloat16)
    native("bmm_cpu")(out.transpose(0, 1), x.transpose(0, 1), packed(weight), True, None)
    expected = torch.empty_like(out)
    twin("bmm_cpu")(expected.transpose(0, 1), x.transpose(0, 1), weight, True, None)
    assert_near(out, expected, 2**-8)


def shared_arguments(tokens: torch.Tensor, dtype: torch.dtype, weights: list) -> list:
    x, routed = (numbers(TOKENS, 160, dtype=dtype, seed=seed)[tokens] for seed in (40, 41))
    return [x, *weights, routed, 2.5, True, False, False, None, None, None, True]


def shared(tokens: torch.Tensor, dtype: torch.dtype, weights: list, threads: int = 2) -> torch.Tensor:
    return native("shared_expert_cpu", threads)(*shared_arguments(tokens, dtype, weights))


def shared_weights() -> list[torch.Tensor]:
    return [
        numbers(*shape, dtype=torch.bfloat16, seed=42 + i, scale=0.2)
        for i, shape in enumerate([(2 * 72, 160), (160, 72)])
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_shared_expert_is_added_to_the_scaled_routed_ones(dtype):
    weights = shared_weights()
    tokens = torch.arange(TOKENS)
    expected = twin("shared_expert_cpu")(*shared_arguments(tokens, dtype, weights))
    actual = shared(tokens, dtype, [packed(weight) for weight in weights])
    assert_near(actual, expected, ROUNDING[dtype])


def results(tokens: torch.Tensor, threads: int) -> dict[str, torch.Tensor]:
    """Of every operator, [tokens, ..]."""
    found = {}
    for at, model in enumerate(MODELS):
        weights = [packed(weight, threads) for weight in projection_weights(model)]
        for name, result in zip(
            "qkv", projected(model, tokens, torch.bfloat16, weights, threads), strict=True
        ):
            found[f"{name} {at}"] = result
        x = numbers(TOKENS, model.heads, model.kv_rank, dtype=torch.bfloat16, seed=31)[tokens]
        weight = numbers(model.heads, model.v, model.kv_rank, dtype=torch.bfloat16, seed=30)
        out = torch.empty(len(tokens), model.heads, model.v, dtype=torch.bfloat16)
        native("bmm_cpu", threads)(
            out.transpose(0, 1), x.transpose(0, 1), packed(weight, threads), True, None
        )
        found[f"bmm {at}"] = out
    weights = [packed(weight, threads) for weight in shared_weights()]
    found["shared"] = shared(tokens, torch.bfloat16, weights, threads)
    return found


def test_token_result_does_not_depend_on_neighbours_or_threads():
    together = results(torch.arange(TOKENS), 2)
    for threads, tokens in (
        (1, range(TOKENS)),
        (2, [0]),
        (1, [TOKENS - 1]),
        (2, [3, 1, 36, 7]),
        (2, range(16)),
    ):
        chosen = torch.tensor(list(tokens))
        some = results(chosen, threads)
        assert all(same(some[name], together[name][chosen].contiguous()) for name in together)


def test_no_tokens():
    assert {name: len(result) for name, result in results(torch.arange(0), 2).items() if len(result)} == {}


def digests() -> dict[str, str]:
    return {
        name: hashlib.sha256(result.view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, result in results(torch.arange(TOKENS), 2).items()
    }


def test_the_avx2_kernels_compute_the_same():
    """KT_KERNEL_CPU_VARIANT is read once per process. Without bf16 instructions both tiers sum alike."""
    if "avx512f" not in kt_kernel_ext.cpu_features()["active"]:
        pytest.skip("this CPU has one tier only")
    script = "import json, test_mla as t; print(json.dumps(t.digests()))"
    found = []
    for variant in ("avx2", "avx512"):
        environment = os.environ | {"KT_KERNEL_CPU_VARIANT": variant}
        done = subprocess.run(
            [sys.executable, "-c", script],
            cwd=Path(__file__).parent,
            env=environment,
            capture_output=True,
            text=True,
            timeout=480,
        )
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout.splitlines()[-1]))
    assert found[0] == found[1]


def test_bad_arguments_are_named():
    model = MODELS[0]
    weights = projection_weights(model)
    with pytest.raises(Exception, match=r"qkv_a_proj_weight is .* as it was loaded"):
        projected(model, torch.arange(2), torch.bfloat16, weights)
    other = [packed(weight) for weight in projection_weights(MODELS[1])]
    mixed = [packed(weights[0]), packed(weights[1]), other[2]]
    with pytest.raises(Exception, match=r"expected .* rows and \[3, 64, 48\]"):
        projected(model, torch.arange(2), torch.bfloat16, mixed)
    x = torch.zeros(8, 2, 32, dtype=torch.bfloat16)
    with pytest.raises(Exception, match=r"mat2 is .*; expected \[8, 32, 32\]"):
        native("bmm_cpu")(x, x, mixed[2], True, None)
    with pytest.raises(Exception, match="called with scales"):
        native("shared_expert_cpu")(x[0], x[0], x[0], x[0], 1.0, True, True, False, None, None, None, True)
