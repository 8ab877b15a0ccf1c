"""Repairs of SGLang 0.5.23's path for machines without a GPU. Each is hooked in hooks.py, with the reason
there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from kt_kernel.errors import ConfigurationError
from kt_kernel.formats.values import mxfp4

# An attribute of layers whose experts are slots of ours.
PLAYS_DEVICE = "kt_plays_device"


def moe_forward_skipping(
    original: Callable, layer: torch.nn.Module, x: torch.Tensor, topk_output: Any, moe_runner_config: Any
) -> torch.Tensor:
    """Around `moe_forward_native`: x [tokens, hidden] through the experts of ids >= 0; ids of -1 add nothing.

    Written for the experts our layers wrap: SwiGLU or its clamped variants, with gate rows before up rows or
    (gpt-oss) in turn, with or without biases. Other layers get stock code, unless a negative id is there, or
    a clamped variant with gate rows before up rows, which stock code computes wrongly. Ours round as the
    CPU's experts do, so that a token's result hardly depends on who computes an expert: what is multiplied to
    bfloat16, sums to float32.
    """
    weights, ids, _ = topk_output
    is_ours = getattr(layer, PLAYS_DEVICE, False)
    if not is_ours and bool((ids >= 0).all()) and not _is_clamped_in_halves(moe_runner_config):
        return original(layer, x, topk_output, moe_runner_config)
    w13_bias, w2_bias = (getattr(layer, name, None) for name in ("w13_weight_bias", "w2_weight_bias"))
    multiplied, summed = (torch.bfloat16, torch.float32) if is_ours else (x.dtype, x.dtype)
    rows = x.to(multiplied)
    output = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in ids[ids >= 0].unique().tolist():
        token, choice = (ids == expert).nonzero(as_tuple=True)
        both = _product(rows[token], layer.w13_weight, w13_bias, expert).to(summed)
        middle = _gated(both, moe_runner_config).to(multiplied)
        down = _product(middle, layer.w2_weight, w2_bias, expert).to(summed)
        output.index_add_(0, token, down.float() * weights[token, choice, None].float())
    return output.to(x.dtype)


def _product(
    rows: torch.Tensor, weights: torch.Tensor, biases: torch.Tensor | None, expert: int
) -> torch.Tensor:
    """rows [n, K] through one of `weights` [E, N, K], plus its bias [E, N], in float64: once rounded, the
    same bits for a row whatever rows are beside it.

    torch adds in an order that depends on their number. In float64 that changes the rounded result only if
    it is within some 1e-13 of a tie.
    """
    bias = None if biases is None else biases[expert].double()
    return F.linear(rows.double(), weights[expert].double(), bias)


def rows_in_turn(config: Any) -> bool:
    """Do rows of gate and up alternate?

    SGLang says so of every model, and means it of those with a gate of its own steepness.
    """
    return config.gemm1_alpha is not None and config.gate_up_interleaved


def _is_clamped_in_halves(config: Any) -> bool:
    clamped = config.gemm1_alpha is not None or config.swiglu_limit is not None
    return clamped and not rows_in_turn(config)


def _gated(both: torch.Tensor, config: Any) -> torch.Tensor:
    gate, up = (both[..., ::2], both[..., 1::2]) if rows_in_turn(config) else both.chunk(2, dim=-1)
    limit = config.swiglu_limit or config.gemm1_clamp_limit
    if limit:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    if config.gemm1_alpha is None:
        return F.silu(gate) * up
    return gate * torch.sigmoid(config.gemm1_alpha * gate) * (up + 1)


def decode_mxfp4_experts(original: Callable, method: Any, layer: torch.nn.Module) -> None:
    """Around `Mxfp4MoEMethod.process_weights_after_loading`: the experts beside ours become bfloat16.

    Stock code asks triton_kernels to decode them, which need a GPU.
    """
    if layer.quant_method is method:
        original(method, layer)  # none of ours
        return
    for name in ("w13_weight", "w2_weight"):
        codes, scales = getattr(layer, name).data, getattr(layer, f"{name}_scale").data
        decoded = torch.stack([mxfp4(*parts).bfloat16() for parts in zip(codes, scales, strict=True)])
        setattr(layer, name, torch.nn.Parameter(decoded, requires_grad=False))
        delattr(layer, f"{name}_scale")


def pad_intermediate_size(original: Callable, model_config: Any, name: str, multiple: int) -> Any:
    """Around `update_intermediate_size`: a size for each layer (Hunyuan's) is left as it is.

    Stock code takes it for a number. Raises ConfigurationError for sizes that it would have to pad.
    """
    sizes = _looked_up(model_config, name)
    if not isinstance(sizes, (list, tuple)):
        return original(model_config, name, multiple)
    if any(size % multiple for size in sizes):
        raise ConfigurationError(
            f"{name} of the model's layers is {sorted(set(sizes))}, expected multiples of {multiple} on a "
            "CPU; give a smaller --tp-size."
        )
    return model_config


def _looked_up(model_config: Any, name: str) -> Any:
    """From where stock code takes it: `model_config` is a ModelConfig, or a part of a configuration."""
    whole = getattr(model_config, "hf_config", None)
    holders = (getattr(whole, "text_config", None), whole, model_config)
    return next((getattr(holder, name) for holder in holders if hasattr(holder, name)), None)


def flatten_heads(result: None, attention: Any, *arguments: Any, **options: Any) -> None:
    """After `HunYuanAttention.__init__`: its normalised queries and keys, a row for each head, have a row for
    each token again where the attention layer counts rows.
    """
    of_tokens = attention.attn.forward

    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
        tokens = v.shape[0]
        return of_tokens(q.reshape(tokens, -1), k.reshape(tokens, -1), v, *rest, **named)

    attention.attn.forward = forward


def attention_handler(original: Callable, registry: type, backend_name: str) -> Callable:
    """Around `AttentionBackendRegistry.get_handler`: latent attention always in its absorbed form.

    Stock code lets the CPU's backends, which have no handlers, use Triton's. That one computes prompts from
    full keys and values if no request of the batch has a cached prefix: torch_native ignores those and reads
    the latent cache, and with intel_amx a prompt's bits would depend on its neighbours and its chunks.
    """
    if backend_name in ("torch_native", "intel_amx") and backend_name not in registry._handlers:
        from sglang.srt.models.deepseek_common.attention_backend_handler import _dispatch_mla_subtype

        return _dispatch_mla_subtype
    return original(registry, backend_name)


def fuse_projections(original: Callable, attention: Any) -> None:
    """Around `init_mla_fused_rope_cpu_forward`: not where the fused operator would turn other pairs.

    It has no argument for rotation in halves, nor for none.
    """
    original(attention)
    rotary = attention.rotary_emb
    if (rotary is None or rotary.is_neox_style) and hasattr(attention, "quant_method"):
        del attention.quant_method


def rope(
    original: Callable,
    head_size: int,
    rotary_dim: int,
    max_position: int,
    base: int,
    is_neox_style: bool = True,  # noqa: FBT001, FBT002 - the signature is SGLang's
    rope_scaling: dict | None = None,
    dtype: torch.dtype | None = None,
    partial_rotary_factor: float = 1.0,
    device: str | None = None,
) -> Any:
    """Around `get_rope_wrapper`: unscaled positions are the plain `get_rope`'s, on a CPU too."""
    arguments = (
        head_size,
        rotary_dim,
        max_position,
        base,
        is_neox_style,
        rope_scaling,
        dtype,
        partial_rotary_factor,
    )
    if device == "cpu" and rope_scaling is None:
        from sglang.srt.layers.rotary_embedding.factory import get_rope

        return get_rope(*arguments)
    return original(*arguments, device)


def add_gated_shared_expert(
    hidden_states: torch.Tensor,
    gate_weight: torch.Tensor,
    shared_output: torch.Tensor,
    final_hidden_states: torch.Tensor,
) -> None:
    """final_hidden_states [tokens, hidden] += sigmoid(hidden_states @ gate_weight) * shared_output, in
    float32.
    """
    gate = torch.sigmoid(hidden_states.float() @ gate_weight.float()).unsqueeze(-1)
    final_hidden_states.add_((gate * shared_output.float()).to(final_hidden_states.dtype))


def normalise_queries_and_keys(
    norm: Any, q: torch.Tensor, k: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Replaces `MiniMaxM2QKRMSNorm._forward_naive`: RMS norms of q and k [tokens, width] over all heads."""
    from sglang.srt.layers.dp_attention import attn_tp_all_reduce

    squares = torch.stack([matrix.float().square().sum(-1) for matrix in (q, k)])
    if norm._world_size > 1:
        squares = attn_tp_all_reduce(squares)
    normalised = []
    for matrix, of_matrix, sums in zip((q, k), (norm._q_norm, norm._k_norm), squares, strict=True):
        mean = sums[:, None] / (matrix.shape[1] * norm._world_size)
        scaled = matrix.float() * torch.rsqrt(mean + norm._eps) * of_matrix.weight.float()
        normalised.append(scaled.to(matrix.dtype))
    return tuple(normalised)
