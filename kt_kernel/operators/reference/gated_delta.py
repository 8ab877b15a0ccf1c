"""Gated delta rule (Qwen3-Next, Qwen3.5) in plain torch: the slow twin of csrc/operators/gated_delta.cc.

One value head keeps a state S of [key dimension, value dimension]. A token decays it, compares what S says of
its key with its value, and writes the difference back; the query reads the result:

    S <- exp(g) * S;   delta = beta * (v - k S);   S <- S + k^T delta;   o = q S

Everything is computed in float32, or in float64 where an input is float64, and rounded once. SGLang declares
the pool of states [slots, value heads, value dimension, key dimension]; an element [slot, head] of it holds S
row by row, so that one key's row of values lies together.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

NORM_EPSILON = 1e-6  # of the keys' and queries' lengths, as in transformers


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


# ---- causal convolution ----------------------------------------------------------------------------------


def causal_conv1d_weight_pack(weight: torch.Tensor) -> torch.Tensor:
    """[channels, width] -> a tensor of the same shape whose memory is [width, channels]: what the convolution
    takes. The shape stays, because SGLang copies the result back into the parameter it came from.
    """
    return weight.t().contiguous().view(weight.shape)


def _unpacked(weight: torch.Tensor, is_packed: bool) -> torch.Tensor:
    """[width, channels], widened."""
    channels, width = weight.shape
    return _wide(weight.reshape(width, channels) if is_packed else weight.t())


def _convolve(
    rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, silu: bool
) -> torch.Tensor:
    """`rows`: [width - 1 + tokens, channels], oldest first -> [tokens, channels]."""
    tokens = rows.shape[0] - weight.shape[0] + 1
    total = torch.zeros(tokens, rows.shape[1], dtype=weight.dtype)
    if bias is not None:
        total += _wide(bias)
    for tap in range(weight.shape[0]):
        total += rows[tap : tap + tokens].to(weight.dtype) * weight[tap]
    return F.silu(total) if silu else total


def causal_conv1d_fwd_cpu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    conv_states: torch.Tensor,
    query_start_loc: torch.Tensor,
    cache_indices: torch.Tensor,
    has_initial_state: torch.Tensor | None,
    silu_activation: bool,
    pad_slot_id: int,
    is_packed: bool,
) -> torch.Tensor:
    """Prefill: `x` [tokens, channels] of all requests, one below the other -> the same shape.

    Request i has the tokens query_start_loc[i] .. query_start_loc[i + 1]; its last width - 1 inputs stay in
    conv_states[cache_indices[i]] ([channels, width - 1], oldest first). Requests at `pad_slot_id` are left
    out.
    """
    weight = _unpacked(weight, is_packed)
    width = weight.shape[0]
    out = torch.zeros_like(x)
    starts = query_start_loc.tolist()
    for i, slot in enumerate(cache_indices.tolist()):
        if slot == pad_slot_id or starts[i] == starts[i + 1]:
            continue
        mine = x[starts[i] : starts[i + 1]]
        state = conv_states[slot].t()
        before = torch.zeros(width - 1, x.shape[1], dtype=x.dtype)
        if has_initial_state is None or bool(has_initial_state[i]):
            before = state.to(x.dtype)
        rows = torch.cat((before, mine))
        out[starts[i] : starts[i + 1]] = _convolve(rows, weight, bias, silu_activation).to(x.dtype)
        state.copy_(rows[rows.shape[0] - width + 1 :])
    return out


def causal_conv1d_update_cpu(
    x: torch.Tensor,
    conv_states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    silu_activation: bool,
    conv_state_indices: torch.Tensor,
    pad_slot_id: int,
    is_packed: bool,
    intermediate_conv_window: torch.Tensor | None = None,
    intermediate_state_indices: torch.Tensor | None = None,
    retrieve_next_token: torch.Tensor | None = None,
    retrieve_next_sibling: torch.Tensor | None = None,
    retrieve_parent_token: torch.Tensor | None = None,
) -> torch.Tensor:
    """Decode: `x` [requests, channels], or [requests, tokens, channels] of drafts -> the same shape.

    Without `intermediate_conv_window` the state moves on. With it (verification of drafts) the window after
    each token goes to intermediate_conv_window[intermediate_state_indices[i], token] ([channels, width - 1])
    and the state stays what it was. With a tree of drafts a token's predecessors are its ancestors;
    `retrieve_parent_token` receives them.
    """
    weight = _unpacked(weight, is_packed)
    width = weight.shape[0]
    drafts = x.unsqueeze(1) if x.dim() == 2 else x
    out = torch.zeros_like(drafts)
    for i, slot in enumerate(conv_state_indices.tolist()):
        if slot == pad_slot_id:
            continue
        state = conv_states[slot].t()
        tokens = drafts[i]
        parents = list(range(-1, len(tokens) - 1))
        if retrieve_parent_token is not None:
            parents = draft_parents(retrieve_next_token[i].tolist(), retrieve_next_sibling[i].tolist())
            retrieve_parent_token[i].copy_(torch.tensor([max(parent, 0) for parent in parents]))
        for token in range(len(tokens)):
            ancestors = _path(parents, token)[-width:]
            rows = torch.cat((state.to(x.dtype), tokens[ancestors]))[-width:]
            out[i, token] = _convolve(rows, weight, bias, silu_activation)[0].to(x.dtype)
            if intermediate_conv_window is not None:
                window = intermediate_conv_window[int(intermediate_state_indices[i]), token]
                window.copy_(rows[1:].t())
        if intermediate_conv_window is None:
            state.copy_(torch.cat((state.to(x.dtype), tokens))[-(width - 1) :])
    return out.view(x.shape)


def draft_parents(next_token: list[int], next_sibling: list[int]) -> list[int]:
    """The parent of each token of a tree of drafts, -1 for the root, from its first-child and next-sibling
    links (-1: none).
    """
    parents = [-1] * len(next_token)
    for token in range(len(next_token)):
        if next_token[token] != -1:
            parents[next_token[token]] = token
        if next_sibling[token] != -1:
            parents[next_sibling[token]] = parents[token]
    return parents


def _path(parents: list[int], token: int) -> list[int]:
    path = []
    while token >= 0:
        path.append(token)
        token = parents[token]
    return path[::-1]


# ---- gates -----------------------------------------------------------------------------------------------


def fused_gdn_gating_cpu(
    A_log: torch.Tensor, a: torch.Tensor, b: torch.Tensor, dt_bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """[tokens, value heads] -> the logarithm of the decay and the share to write, float32 [1, tokens, heads].

    g = -exp(A_log) * softplus(a + dt_bias), beta = sigmoid(b).
    """
    g = -_wide(A_log).exp() * F.softplus(_wide(a) + _wide(dt_bias))
    return g.unsqueeze(0), _wide(b).sigmoid().unsqueeze(0)


# ---- the recurrence --------------------------------------------------------------------------------------


def _normalised(rows: torch.Tensor) -> torch.Tensor:
    rows = _wide(rows)
    return rows * torch.rsqrt(rows.square().sum(-1, keepdim=True) + NORM_EPSILON)


def _step(
    state: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
) -> torch.Tensor:
    """One token: `state` [heads, K, V] is changed; q, k [heads, K] (q scaled), v [heads, V] -> [heads, V]."""
    state *= g.exp()[:, None, None]
    delta = beta[:, None] * (v - torch.einsum("hk,hkv->hv", k, state))
    state += torch.einsum("hk,hv->hkv", k, delta)
    return torch.einsum("hk,hkv->hv", q, state)


def _heads(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, normalise: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[1, tokens, heads, dim] -> [tokens, value heads, dim], queries scaled by K^-0.5."""
    if normalise:
        q, k = _normalised(q), _normalised(k)
    share = v.shape[2] // q.shape[2]
    q = _wide(q)[0].repeat_interleave(share, dim=1) * q.shape[-1] ** -0.5
    return q, _wide(k)[0].repeat_interleave(share, dim=1), _wide(v)[0]


def _as_rows(state: torch.Tensor) -> torch.Tensor:
    """A pool's [..., V, K] as what its memory holds: [..., K, V]."""
    return state.view(*state.shape[:-2], state.shape[-1], state.shape[-2])


def chunk_gated_delta_rule_cpu(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor,
    cu_seqlens: torch.Tensor,
    use_qk_l2norm_in_kernel: bool,
    initial_state_indices: torch.Tensor,
) -> torch.Tensor:
    """Prefill: q, k [1, tokens, key heads, K], v [1, tokens, value heads, V] -> [1, tokens, value heads, V].

    Request i continues from initial_state[initial_state_indices[i]] and leaves its state there; a negative
    index begins with zeros and leaves nothing.
    """
    q, k, v = _heads(query, key, value, use_qk_l2norm_in_kernel)
    out = torch.zeros_like(value)
    starts = cu_seqlens.tolist()
    for i, slot in enumerate(initial_state_indices.tolist()):
        pool = _as_rows(initial_state)[slot] if slot >= 0 else torch.zeros_like(_as_rows(initial_state)[0])
        state = pool.to(q.dtype, copy=True)
        for token in range(starts[i], starts[i + 1]):
            out[0, token] = _step(state, q[token], k[token], v[token], g[0, token], beta[0, token])
        pool.copy_(state)
    return out


def fused_sigmoid_gating_delta_rule_update_cpu(
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    initial_state_source: torch.Tensor,
    initial_state_indices: torch.Tensor,
    cu_seqlens: torch.Tensor,
    use_qk_l2norm_in_kernel: bool,
    softplus_beta: float = 1.0,
    softplus_threshold: float = 20.0,
    is_kda: bool = False,  # noqa: FBT002
    disable_state_update: bool = False,  # noqa: FBT002
    intermediate_states_buffer: torch.Tensor | None = None,
    intermediate_state_indices: torch.Tensor | None = None,
    cache_steps: int | None = None,
    retrieve_parent_token: torch.Tensor | None = None,
) -> torch.Tensor:
    """Decode: as chunk_gated_delta_rule_cpu, with the gates of fused_gdn_gating_cpu computed on the way.

    With `intermediate_states_buffer` [slots, steps, value heads, V, K] (verification of drafts) the state
    after each token goes to its row intermediate_state_indices[i]; with `retrieve_parent_token` [requests,
    tokens] a token begins from its parent's.
    """
    if is_kda:
        raise NotImplementedError(
            "only the gated delta rule with one gate a head, not Kimi's, got is_kda=True"
        )
    g, beta = fused_gdn_gating_cpu(A_log, a, b, dt_bias)
    q, k, wide_v = _heads(q, k, v, use_qk_l2norm_in_kernel)
    out = torch.zeros_like(v)
    starts = cu_seqlens.tolist()
    for i, slot in enumerate(initial_state_indices.tolist()):
        pool = (
            _as_rows(initial_state_source)[slot]
            if slot >= 0
            else torch.zeros_like(_as_rows(initial_state_source)[0])
        )
        state = pool.to(q.dtype, copy=True)
        after = None
        if intermediate_states_buffer is not None and int(intermediate_state_indices[i]) >= 0:
            after = _as_rows(intermediate_states_buffer)[int(intermediate_state_indices[i])]
        for step, token in enumerate(range(starts[i], starts[i + 1])):
            if retrieve_parent_token is not None and step and after is not None:
                state.copy_(after[int(retrieve_parent_token[i, step])])
            out[0, token] = _step(state, q[token], k[token], wide_v[token], g[0, token], beta[0, token])
            if after is not None:
                after[step].copy_(state)
        if not disable_state_update:
            pool.copy_(state)
    return out


# ---- around it -------------------------------------------------------------------------------------------


def _split_ba(mixed_ba, groups, per_group):
    b, a = mixed_ba.view(-1, groups, 2 * per_group).chunk(2, dim=-1)
    return b.reshape(-1, groups * per_group), a.reshape(-1, groups * per_group)


def fused_qkvzba_split_reshape_cat_cpu(
    mixed_qkvz: torch.Tensor,
    mixed_ba: torch.Tensor,
    num_heads_qk: int,
    num_heads_v: int,
    head_qk: int,
    head_v: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Qwen3-Next's projections, where each key head's q, k, v, z stand together -> (q of all heads | k | v,
    z [tokens, value heads, head_v], b, a [tokens, value heads]).
    """
    values = num_heads_v // num_heads_qk * head_v
    grouped = mixed_qkvz.view(-1, num_heads_qk, 2 * head_qk + 2 * values)
    q, k, v, z = grouped.split([head_qk, head_qk, values, values], dim=-1)
    qkv = torch.cat([part.reshape(len(mixed_qkvz), -1) for part in (q, k, v)], dim=-1)
    b, a = _split_ba(mixed_ba, num_heads_qk, num_heads_v // num_heads_qk)
    return qkv, z.reshape(-1, num_heads_v, head_v), b, a


def fused_qkvzba_split_reshape_cat_contiguous_cpu(
    mixed_qkvz: torch.Tensor,
    mixed_ba: torch.Tensor,
    num_heads_qk: int,
    num_heads_v: int,
    head_qk: int,
    head_v: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same for Qwen3.5's, which stand as all q | all k | all v | all z and all b | all a."""
    qkv, z = mixed_qkvz.split(
        [2 * num_heads_qk * head_qk + num_heads_v * head_v, num_heads_v * head_v], dim=-1
    )
    b, a = mixed_ba.chunk(2, dim=-1)
    return qkv.contiguous(), z.reshape(-1, num_heads_v, head_v), b.contiguous(), a.contiguous()


def fused_rmsnorm_gated_cpu(
    input: torch.Tensor, weight: torch.Tensor, gate: torch.Tensor, eps: float
) -> torch.Tensor:
    """[rows, columns] -> rms_norm(input) * weight * silu(gate), rounded once."""
    x = _wide(input)
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * _wide(weight)
    return (normed * F.silu(_wide(gate))).to(input.dtype)


_SPLIT = (
    "(Tensor mixed_qkvz, Tensor mixed_ba, int num_heads_qk, int num_heads_v, int head_qk, int head_v) -> "
    "(Tensor, Tensor, Tensor, Tensor)"
)

OPERATORS = {
    "sgl_kernel::causal_conv1d_weight_pack": ("(Tensor weight) -> Tensor", causal_conv1d_weight_pack),
    "sgl_kernel::causal_conv1d_fwd_cpu": (
        "(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) conv_states, Tensor query_start_loc, Tensor "
        "cache_indices, Tensor? has_initial_state, bool silu_activation, int pad_slot_id, bool is_packed) -> "
        "Tensor",
        causal_conv1d_fwd_cpu,
    ),
    "sgl_kernel::causal_conv1d_update_cpu": (
        "(Tensor x, Tensor(a!) conv_states, Tensor weight, Tensor? bias, bool silu_activation, Tensor "
        "conv_state_indices, int pad_slot_id, bool is_packed, Tensor(b!)? intermediate_conv_window=None, "
        "Tensor? intermediate_state_indices=None, Tensor? retrieve_next_token=None, Tensor? "
        "retrieve_next_sibling=None, Tensor(c!)? retrieve_parent_token=None) -> Tensor",
        causal_conv1d_update_cpu,
    ),
    "sgl_kernel::fused_gdn_gating_cpu": (
        "(Tensor A_log, Tensor a, Tensor b, Tensor dt_bias) -> (Tensor, Tensor)",
        fused_gdn_gating_cpu,
    ),
    "sgl_kernel::chunk_gated_delta_rule_cpu": (
        "(Tensor query, Tensor key, Tensor value, Tensor g, Tensor beta, Tensor(a!) initial_state, Tensor "
        "cu_seqlens, bool use_qk_l2norm_in_kernel, Tensor initial_state_indices) -> Tensor",
        chunk_gated_delta_rule_cpu,
    ),
    "sgl_kernel::fused_sigmoid_gating_delta_rule_update_cpu": (
        "(Tensor A_log, Tensor dt_bias, Tensor q, Tensor k, Tensor v, Tensor a, Tensor b, Tensor(a!) "
        "initial_state_source, Tensor initial_state_indices, Tensor cu_seqlens, bool "
        "use_qk_l2norm_in_kernel, float softplus_beta=1.0, float softplus_threshold=20.0, bool "
        "is_kda=False, bool disable_state_update=False, Tensor(b!)? intermediate_states_buffer=None, Tensor? "
        "intermediate_state_indices=None, int? cache_steps=None, Tensor? retrieve_parent_token=None) -> "
        "Tensor",
        fused_sigmoid_gating_delta_rule_update_cpu,
    ),
    "sgl_kernel::fused_qkvzba_split_reshape_cat_cpu": (_SPLIT, fused_qkvzba_split_reshape_cat_cpu),
    "sgl_kernel::fused_qkvzba_split_reshape_cat_contiguous_cpu": (
        _SPLIT,
        fused_qkvzba_split_reshape_cat_contiguous_cpu,
    ),
    "sgl_kernel::fused_rmsnorm_gated_cpu": (
        "(Tensor input, Tensor weight, Tensor gate, float eps) -> Tensor",
        fused_rmsnorm_gated_cpu,
    ),
}
