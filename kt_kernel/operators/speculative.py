"""Bookkeeping of speculative decoding on a CPU: what SGLang imports from sgl_kernel by name.

A call moves a few integers per request, so plain torch and Python do: what costs time in a step is the model.
Arguments and results are those of SGLang's call sites; outputs are arguments, changed in place.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import torch

QLEN_ONLY = 1  # SGLang's TreeMaskMode: the mask covers the drafts alone, not what was there before them


# ---- places in the KV cache ------------------------------------------------------------------------------


def _parts(
    rows: torch.Tensor, starts: torch.Tensor, ends: torch.Tensor
) -> Iterator[tuple[int, slice, slice]]:
    """Each request's row, its span there, and where that lies among all spans one after the other."""
    taken = 0
    for row, start, end in zip(rows.tolist(), starts.tolist(), ends.tolist(), strict=True):
        yield row, slice(start, end), slice(taken, taken + end - start)
        taken += end - start


def assign_req_to_token_pool_cpu(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    pool_len: int,
) -> None:
    """Request i's row of `req_to_token` receives its part of `out_cache_loc` from start[i] to end[i]."""
    for row, span, part in _parts(req_pool_indices, start_offset, end_offset):
        req_to_token[row, span] = out_cache_loc[part].to(req_to_token.dtype)


def assign_extend_cache_locs_cpu(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    pool_len: int,
) -> None:
    """The reverse: start[i] to end[i] of each request's row, one after the other."""
    for row, span, part in _parts(req_pool_indices, start_offset, end_offset):
        out_cache_loc[part] = req_to_token[row, span]


def assign_draft_cache_locs_contiguous_cpu(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    seq_lens: torch.Tensor,
    out_cache_loc: torch.Tensor,
    pool_len: int,
    topk: int,
    num_cols: int,
) -> None:
    """`topk * num_cols` places of each request from its length on."""
    drafts = topk * num_cols
    assign_extend_cache_locs_cpu(
        req_pool_indices, req_to_token, seq_lens, seq_lens + drafts, out_cache_loc, pool_len
    )


def build_draft_decode_metadata_cpu(
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    topk: int,
    num_steps: int,
    pool_len: int,
) -> torch.Tensor:
    """A row of places per request and candidate, [requests * topk, longest + num_steps]: those of the tokens
    before the drafts, then the candidate's own. Candidate c's are the c-th `num_steps` of the request's row
    from its length on.
    """
    lengths = seq_lens.tolist()
    width = max(lengths, default=0) + num_steps
    rows = req_to_token.new_zeros(len(lengths) * topk, width)
    for request, (row, length) in enumerate(zip(req_pool_indices.tolist(), lengths, strict=True)):
        for candidate in range(topk):
            mine = rows[request * topk + candidate]
            mine[:length] = req_to_token[row, :length]
            first = length + candidate * num_steps
            mine[length : length + num_steps] = req_to_token[row, first : first + num_steps]
    return rows


def copy_all_layer_kv_cache_cpu(
    data_ptrs: torch.Tensor, strides: torch.Tensor, tgt_loc: torch.Tensor, src_loc: torch.Tensor
) -> None:
    """Moves tokens from place to place in every buffer, given by address and bytes a token. All are read
    before the first is written.
    """
    sources, targets = src_loc.tolist(), tgt_loc.tolist()
    for address, stride in zip(data_ptrs.tolist(), strides.tolist(), strict=True):
        rows = [ctypes.string_at(address + source * stride, stride) for source in sources]
        for target, row in zip(targets, rows, strict=True):
            ctypes.memmove(address + target * stride, row, stride)


# ---- trees of drafts --------------------------------------------------------------------------------------


def build_tree_kernel_efficient_cpu(
    parent_list: torch.Tensor,
    selected_index: torch.Tensor,
    verified_seq_len: torch.Tensor,
    tree_mask: torch.Tensor,
    positions: torch.Tensor,
    retrieve_index: torch.Tensor,
    retrieve_next_token: torch.Tensor,
    retrieve_next_sibling: torch.Tensor,
    topk: int,
    depth: int,
    draft_token_num: int,
    tree_mask_mode: int,
) -> None:
    """From the chosen candidates ([requests, drafts - 1], numbered over all steps and candidates) and the
    candidates that each step continued: who may see whom, positions, and the tree as first-child and
    next-sibling links (-1: none). Token 0 is the verified one.
    """
    if int(tree_mask_mode) != QLEN_ONLY:
        raise NotImplementedError(
            f"a tree mask over the drafts alone (mode 1), got mode {int(tree_mask_mode)}"
        )
    requests = verified_seq_len.numel()
    masks = tree_mask[: requests * draft_token_num**2].view(requests, draft_token_num, draft_token_num)
    places = positions.view(requests, draft_token_num)
    for request, length in enumerate(verified_seq_len.tolist()):
        chosen = selected_index[request].tolist()
        continued = parent_list[request].tolist()
        parents = _parents(chosen, continued, topk)
        visible = torch.zeros(draft_token_num, draft_token_num, dtype=torch.bool)
        for token, parent in enumerate(parents):
            if parent is not None:
                visible[token] = visible[parent]
            visible[token, token] = visible[token, 0] = True
        masks[request] = visible.to(tree_mask.dtype)
        # the verified token is seen by itself, so a draft's depth is what it sees of the others
        places[request] = visible.sum(-1) - 1 + length
        retrieve_index[request] = torch.arange(draft_token_num) + request * draft_token_num
        children, siblings = _links(parents)
        retrieve_next_token[request] = torch.tensor(children)
        retrieve_next_sibling[request] = torch.tensor(siblings)


def _parents(chosen: list[int], continued: list[int], topk: int) -> list[int | None]:
    """The parent of every token of the tree; None for the verified token and for orphans."""
    token_of = {}
    for token, candidate in enumerate(chosen, start=1):
        token_of.setdefault(candidate, token)
    parents: list[int | None] = [None]
    for candidate in chosen:
        step = candidate // topk
        parents.append(0 if step == 0 else token_of.get(continued[step]))
    return parents


def _links(parents: list[int | None]) -> tuple[list[int], list[int]]:
    """First child and next sibling of each token, in order of their numbers."""
    children, siblings = [-1] * len(parents), [-1] * len(parents)
    for token in range(len(parents) - 1, 0, -1):
        parent = parents[token]
        if parent is not None:
            siblings[token], children[parent] = children[parent], token
    return children, siblings


def reconstruct_indices_from_tree_mask(
    tree_mask: torch.Tensor,
    verified_seq_len: torch.Tensor,
    positions: torch.Tensor,
    retrieve_index: torch.Tensor,
    retrieve_next_token: torch.Tensor,
    retrieve_next_sibling: torch.Tensor,
    batch_size: int,
    draft_token_num: int,
) -> None:
    """The same from a mask [requests, drafts, drafts] of who sees whom (n-gram speculation)."""
    masks = tree_mask.view(batch_size, draft_token_num, draft_token_num).tolist()
    places = positions.view(batch_size, draft_token_num)
    for request, length in enumerate(verified_seq_len.tolist()):
        ancestors = [
            [other for other in range(token) if masks[request][token][other]]
            for token in range(draft_token_num)
        ]
        parents = [seen[-1] if seen else None for seen in ancestors]
        places[request] = torch.tensor([len(seen) + length for seen in ancestors])
        retrieve_index.view(batch_size, -1)[request] = (
            torch.arange(draft_token_num) + request * draft_token_num
        )
        children, siblings = _links(parents)
        retrieve_next_token.view(batch_size, -1)[request] = torch.tensor(children)
        retrieve_next_sibling.view(batch_size, -1)[request] = torch.tensor(siblings)


# ---- verification ------------------------------------------------------------------------------------------


def verify_tree_greedy_cpu(
    predicts: torch.Tensor,
    accept_index: torch.Tensor,
    accept_token_num: torch.Tensor,
    candidates: torch.Tensor,
    retrive_index: torch.Tensor,
    retrive_next_token: torch.Tensor,
    retrive_next_sibling: torch.Tensor,
    target_predict: torch.Tensor,
) -> None:
    """Follows the drafts for as long as one of them is what the model itself says next.

    candidates, target_predict: [requests, drafts]; accept_index [requests, depth + 1] receives the accepted
    tokens' places, accept_token_num how many drafts that are, and predicts the model's token at each of them.
    """
    said, places = target_predict.flatten().tolist(), retrive_index.tolist()
    for request, drafts in enumerate(candidates.tolist()):
        children = retrive_next_token[request].tolist()
        siblings = retrive_next_sibling[request].tolist()
        accepted, at = [places[request][0]], 0
        while len(accepted) < accept_index.shape[1]:
            token = said[accepted[-1]]
            at = children[at]
            while at != -1 and drafts[at] != token:
                at = siblings[at]
            if at == -1:
                break
            predicts[accepted[-1]] = token
            accepted.append(places[request][at])
        predicts[accepted[-1]] = said[accepted[-1]]
        accept_index[request, : len(accepted)] = torch.tensor(accepted, dtype=accept_index.dtype)
        accept_token_num[request] = len(accepted) - 1


def fill_bonus_tokens_cpu(
    accept_tokens: torch.Tensor, accept_lens: torch.Tensor, bonus_tokens: torch.Tensor, accept_stride: int
) -> None:
    """The last accepted token of each request; `accept_lens` counts it."""
    rows = torch.arange(accept_lens.numel()) * accept_stride
    bonus_tokens[: accept_lens.numel()] = accept_tokens.flatten()[rows + accept_lens.long() - 1].to(
        bonus_tokens.dtype
    )


def fill_accept_out_cache_loc_cpu(
    accept_index: torch.Tensor, out_cache_loc: torch.Tensor, accept_out_cache_loc: torch.Tensor
) -> None:
    """The places of the accepted tokens, one after the other; -1 in `accept_index` is none."""
    accepted = accept_index.flatten()
    accepted = accepted[accepted >= 0].long()
    accept_out_cache_loc[: len(accepted)] = out_cache_loc[accepted]


def rotate_input_ids_cpu(
    input_ids: torch.Tensor,
    extend_start_loc: torch.Tensor,
    extend_seq_lens: torch.Tensor,
    topk_index: torch.Tensor,
    select_index: torch.Tensor | None = None,
) -> None:
    """Each request's tokens move one place towards its first, and a new one goes to the last, or to
    `select_index`.
    """
    tokens = topk_index.flatten().tolist()
    spans = zip(extend_start_loc.tolist(), extend_seq_lens.tolist(), strict=True)
    for request, (start, length) in enumerate(spans):
        if length == 0:
            continue
        input_ids[start : start + length - 1] = input_ids[start + 1 : start + length].clone()
        last = start + length - 1 if select_index is None else int(select_index[request])
        input_ids[last] = tokens[request]
