"""The slow twins of the attention operators, in torch and in float64.

Positions of a sequence stand in the cache where its row of `req_to_token` says. Nothing here reads a slot
that no query of the sequence sees.
"""

from __future__ import annotations

import torch
from torch import Tensor


def store_cache_cpu(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, indices: Tensor, row_dim: int
) -> None:
    """Write k and v [tokens, ...] of `row_dim` numbers each into rows `indices` of the caches."""
    k_cache.view(-1, row_dim)[indices] = k.reshape(-1, row_dim).to(k_cache.dtype)
    v_cache.view(-1, row_dim)[indices] = v.reshape(-1, row_dim).to(v_cache.dtype)


def visible_keys(new_tokens: int, length: int, window: int, tree: Tensor | None, is_causal: bool) -> Tensor:
    """Bool [new_tokens, length]: which positions the queries of a sequence's last positions see.

    `window` counts the keys that a token sees, itself among them; 0 or less is no window. `tree` [new_tokens,
    new_tokens] replaces the causal order among the new tokens.
    """
    key = torch.arange(length)
    query = torch.arange(length - new_tokens, length)[:, None]
    if not is_causal:
        return torch.ones(new_tokens, length, dtype=torch.bool)
    seen = key <= query
    if tree is not None:
        seen[:, length - new_tokens :] = tree
    if window > 0:
        seen &= key > query - window
    return seen


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor,
    *,
    scale: float,
    logit_cap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """float64 [tokens, heads, value_dim] of q [tokens, heads, dim], k [length, kv_heads, dim], v likewise.

    Keys that a query does not see may hold anything, NaN included.
    """
    group = q.shape[1] // k.shape[1]
    result = torch.zeros(q.shape[0], q.shape[1], v.shape[2], dtype=torch.float64)
    for token in range(q.shape[0]):
        keys = k[seen[token]].double().repeat_interleave(group, 1)  # [seen, heads, dim]
        values = v[seen[token]].double().repeat_interleave(group, 1)
        scores = torch.einsum("hd,khd->hk", q[token].double(), keys) * scale
        if logit_cap > 0:
            scores = logit_cap * torch.tanh(scores / logit_cap)
        if sinks is not None:
            scores = torch.cat((scores, sinks[:, None].double()), 1)
        weights = torch.softmax(scores, 1)[:, : len(keys)]
        result[token] = torch.einsum("hk,khd->hd", weights, values)
    return result


def extend_attention_cpu(
    q_extend: Tensor,
    k_extend: Tensor | None,
    v_extend: Tensor | None,
    o_extend: Tensor,
    k_buffer: Tensor,
    v_buffer: Tensor,
    k_scale: float,
    v_scale: float,
    req_to_token: Tensor,
    req_pool_indices: Tensor,
    seq_lens: Tensor,
    extend_seq_lens: Tensor,
    extend_start_loc: Tensor,
    max_len_extend: int,
    sm_scale: float,
    logit_cap: float,
    is_cross_attn: bool,
    sliding_window_size: int,
    encoder_lens: Tensor | None,
    sinks: Tensor | None,
    tree_mask: Tensor | None,
    is_causal: bool,
) -> None:
    """Fill o_extend [tokens, heads, value_dim] with the attention of each sequence's new tokens.

    `seq_lens` counts prefix and new tokens, whose keys and values are in the buffers already. Where the
    buffers cannot hold k_extend (compressed caches), k_extend and v_extend are what is attended to, and there
    may be no prefix. `tree_mask`: bool, [new, new] of each sequence behind each other. For
    `sliding_window_size` see `visible_keys`.
    """
    if is_cross_attn or encoder_lens is not None:
        raise ValueError("attention to an encoder's keys was asked for; expected a decoder alone")
    own = k_extend is not None and k_extend.shape[1:] != k_buffer.shape[1:]
    tree_begin = 0
    for i in range(len(seq_lens)):
        length, new, start = int(seq_lens[i]), int(extend_seq_lens[i]), int(extend_start_loc[i])
        if new == 0:
            continue
        tree = None
        if tree_mask is not None:
            tree = tree_mask[tree_begin : tree_begin + new * new].view(new, new).bool()
            tree_begin += new * new
        seen = visible_keys(new, length, sliding_window_size, tree, is_causal)
        if own:
            k, v = k_extend[start : start + new], v_extend[start : start + new]
        else:
            slots = req_to_token[req_pool_indices[i], :length].clone()
            slots[~seen.any(0)] = slots[-1]
            k, v = k_buffer[slots], v_buffer[slots]
        out = attend(
            q_extend[start : start + new],
            k,
            v,
            seen,
            scale=sm_scale * k_scale,
            logit_cap=logit_cap,
            sinks=sinks,
        )
        o_extend[start : start + new] = (out * v_scale).to(o_extend.dtype)


def decode_attention_cpu(
    query: Tensor,
    k_buffer: Tensor,
    v_buffer: Tensor,
    k_scale: float,
    v_scale: float,
    output: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    loc: Tensor | None,
    attn_logits: Tensor,
    req_to_token: Tensor,
    req_pool_indices: Tensor,
    seq_lens: Tensor,
    sm_scale: float,
    logit_cap: float,
    is_cross_attn: bool,
    sliding_window_size: int,
    encoder_lens: Tensor | None,
    sinks: Tensor | None,
) -> None:
    """Write key and value, where given, into slots `loc`; fill output [sequences, heads, value_dim].

    A value buffer that is a part of the key buffer's rows is not written for itself.
    """
    if key is not None:
        k_buffer[loc] = key.view(-1, *k_buffer.shape[1:]).to(k_buffer.dtype)
        if v_buffer.data_ptr() != k_buffer.data_ptr():
            v_buffer[loc] = value.view(-1, *v_buffer.shape[1:]).to(v_buffer.dtype)
    count = len(seq_lens)
    extend_attention_cpu(
        query,
        None,
        None,
        output,
        k_buffer,
        v_buffer,
        k_scale,
        v_scale,
        req_to_token,
        req_pool_indices,
        seq_lens,
        seq_lens.clamp(max=1),
        torch.arange(count),
        1,
        sm_scale,
        logit_cap,
        is_cross_attn,
        sliding_window_size,
        encoder_lens,
        sinks,
        tree_mask=None,
        is_causal=True,
    )


OPERATORS = {
    "sgl_kernel::store_cache_cpu": (
        "(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor indices, int row_dim) -> ()",
        store_cache_cpu,
    ),
    "sgl_kernel::decode_attention_cpu": (
        "(Tensor query, Tensor(a!) k_buffer, Tensor(b!) v_buffer, float k_scale, float v_scale, Tensor(c!) "
        "output, Tensor? key, Tensor? value, Tensor? loc, Tensor attn_logits, Tensor req_to_token, Tensor "
        "req_pool_indices, Tensor seq_lens, float sm_scale, float logit_cap, bool is_cross_attn, int "
        "sliding_window_size, Tensor? encoder_lens, Tensor? sinks) -> ()",
        decode_attention_cpu,
    ),
    "sgl_kernel::extend_attention_cpu": (
        "(Tensor q_extend, Tensor? k_extend, Tensor? v_extend, Tensor(a!) o_extend, Tensor k_buffer, Tensor"
        " v_buffer, float k_scale, float v_scale, Tensor req_to_token, Tensor req_pool_indices, Tensor "
        "seq_lens, Tensor extend_seq_lens, Tensor extend_start_loc, int max_len_extend, float sm_scale, "
        "float logit_cap, bool is_cross_attn, int sliding_window_size, Tensor? encoder_lens, Tensor? sinks,"
        " Tensor? tree_mask, bool is_causal) -> ()",
        extend_attention_cpu,
    ),
}
