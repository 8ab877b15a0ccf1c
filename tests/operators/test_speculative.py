"""Speculative decoding's bookkeeping against what it means, written out by hand or by search.

A wrong place in the KV cache, or a draft accepted against the wrong parent, gives plausible text.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch

from kt_kernel.integrations.sglang.cpu_speculation import commit_states
from kt_kernel.operators import speculative


def table() -> torch.Tensor:
    return torch.arange(60, dtype=torch.int32).view(4, 15)


def test_places_are_written_and_read_back():
    pool = table()
    rows, starts, ends = torch.tensor([2, 0]), torch.tensor([3, 0]), torch.tensor([5, 4])
    places = torch.arange(100, 106)
    speculative.assign_req_to_token_pool_cpu(rows, pool, starts, ends, places, 15)
    assert pool[2].tolist() == [30, 31, 32, 100, 101, *range(35, 45)]
    assert pool[0, :5].tolist() == [102, 103, 104, 105, 4]
    read = torch.zeros(6, dtype=torch.int64)
    speculative.assign_extend_cache_locs_cpu(rows, pool, starts, ends, read, 15)
    assert torch.equal(read, places)


def test_each_candidate_sees_the_prefix_and_its_own_drafts():
    pool, lengths, topk, steps = table(), torch.tensor([4, 6]), 2, 3
    places = torch.zeros(2 * topk * steps, dtype=torch.int64)
    speculative.assign_draft_cache_locs_contiguous_cpu(
        torch.tensor([1, 3]), pool, lengths, places, 15, topk, steps
    )
    assert places.tolist() == [*range(19, 25), *range(51, 57)]
    seen = speculative.build_draft_decode_metadata_cpu(pool, torch.tensor([1, 3]), lengths, topk, steps, 15)
    for request, (first, length) in enumerate(((15, 4), (45, 6))):
        for candidate in range(topk):
            drafts = places.view(2, topk, steps)[request, candidate].tolist()
            row = seen[request * topk + candidate, : length + steps].tolist()
            assert row == [*range(first, first + length), *drafts]


def test_tokens_move_in_every_buffer_at_once():
    buffers = [torch.arange(12.0).view(6, 2), torch.arange(6, dtype=torch.int16).view(6, 1)]
    expected = [buffer.clone() for buffer in buffers]
    targets, sources = torch.tensor([1, 2]), torch.tensor([2, 5])
    for buffer in expected:
        buffer[targets] = buffer[sources]
    addresses = torch.tensor([buffer.data_ptr() for buffer in buffers], dtype=torch.uint64)
    speculative.copy_all_layer_kv_cache_cpu(addresses, torch.tensor([8, 2]), targets, sources)
    assert all(torch.equal(mine, other) for mine, other in zip(buffers, expected, strict=True))


# A tree of six tokens, the verified one first: 0 -> 1, 2;  1 -> 3, 4;  4 -> 5.
PARENTS = [-1, 0, 0, 1, 1, 4]
DEPTHS = [0, 1, 1, 2, 2, 3]
CHILDREN = [1, 3, -1, -1, 5, -1]
SIBLINGS = [-1, 2, -1, 4, -1, -1]


def ancestors(token: int) -> list[int]:
    return [] if token < 0 else [*ancestors(PARENTS[token]), token]


def visible() -> torch.Tensor:
    mask = torch.zeros(6, 6, dtype=torch.bool)
    for token in range(6):
        mask[token, ancestors(token)] = True
    return mask


def built() -> dict[str, torch.Tensor]:
    """Two requests with that tree, as SGLang numbers candidates: the first step's `topk` are 0 and 1, those
    of the next steps follow, and `parent_list` says which candidate each group of `topk` continued.
    """
    topk, requests = 2, 2
    # groups: 0 -> candidates 0, 1; 1 (continues 0) -> 2, 3; 2 (continues 1) -> 4, 5; 3 (continues 3) -> 6, 7
    parent_list = torch.tensor([[-1, 0, 1, 3]] * requests)
    chosen = torch.tensor([[0, 1, 2, 3, 6]] * requests)
    made = {
        "tree_mask": torch.ones(requests * 36, dtype=torch.bool),
        "positions": torch.zeros(requests * 6, dtype=torch.int64),
        "retrieve_index": torch.full((requests, 6), -1),
        "retrieve_next_token": torch.full((requests, 6), -1),
        "retrieve_next_sibling": torch.full((requests, 6), -1),
    }
    speculative.build_tree_kernel_efficient_cpu(
        parent_list, chosen, torch.tensor([10, 20]), *made.values(), topk, 3, 6, speculative.QLEN_ONLY
    )
    return made


def check_tree(made: dict[str, torch.Tensor]) -> None:
    assert made["positions"].view(2, 6).tolist() == [
        [length + depth for depth in DEPTHS] for length in (10, 20)
    ]
    assert made["retrieve_index"].tolist() == [list(range(6)), list(range(6, 12))]
    assert made["retrieve_next_token"].tolist() == [CHILDREN] * 2
    assert made["retrieve_next_sibling"].tolist() == [SIBLINGS] * 2


def test_a_tree_is_built_from_the_chosen_candidates():
    made = built()
    check_tree(made)
    assert torch.equal(made["tree_mask"].view(2, 6, 6), visible().expand(2, 6, 6))


def test_a_tree_is_read_from_its_mask():
    made = built()
    again = {name: torch.zeros_like(tensor) for name, tensor in made.items() if name != "tree_mask"}
    speculative.reconstruct_indices_from_tree_mask(
        made["tree_mask"], torch.tensor([10, 20]), *again.values(), 2, 6
    )
    check_tree(again)


def test_drafts_are_accepted_along_the_path_the_model_takes():
    """Request 0 takes 0 -> 1 -> 4 and then says something else; request 1 refuses every draft."""
    made = built()
    drafts = torch.tensor([[7, 11, 12, 13, 14, 15], [7, 11, 12, 13, 14, 15]])
    said = torch.tensor([[11, 14, 0, 0, 99, 0], [50, 0, 0, 0, 0, 0]])
    predicts = torch.zeros(12, dtype=torch.int32)
    accepted = torch.full((2, 4), -1, dtype=torch.int32)
    counts = torch.zeros(2, dtype=torch.int32)
    speculative.verify_tree_greedy_cpu(
        *(predicts, accepted, counts, drafts),
        *(made["retrieve_index"], made["retrieve_next_token"], made["retrieve_next_sibling"], said),
    )
    assert counts.tolist() == [2, 0]
    assert accepted.tolist() == [[0, 1, 4, -1], [6, -1, -1, -1]]
    assert predicts[[0, 1, 4, 6]].tolist() == [11, 14, 99, 50]

    places = torch.zeros(4, dtype=torch.int64)
    speculative.fill_accept_out_cache_loc_cpu(accepted, torch.arange(200, 212), places)
    assert places.tolist() == [200, 201, 204, 206]
    last = torch.zeros(2, dtype=torch.int32)
    tokens = torch.tensor([[11, 14, 99, -1], [50, -1, -1, -1]])
    speculative.fill_bonus_tokens_cpu(tokens, counts + 1, last, 4)
    assert last.tolist() == [99, 50]


def test_prompts_move_on_by_one_token():
    ids = torch.arange(10)
    starts, lengths = torch.tensor([0, 4, 4]), torch.tensor([4, 0, 6])
    speculative.rotate_input_ids_cpu(ids, starts, lengths, torch.tensor([[70], [71], [72]]))
    assert ids.tolist() == [1, 2, 3, 70, 5, 6, 7, 8, 9, 72]
    speculative.rotate_input_ids_cpu(
        ids, starts, lengths, torch.tensor([80, 81, 82]), torch.tensor([1, 4, 7])
    )
    assert ids.tolist() == [2, 80, 70, 70, 6, 7, 8, 82, 72, 72]


def test_the_states_after_the_last_accepted_draft_become_the_requests_own():
    torch.manual_seed(0)
    convolution = torch.randn(2, 5, 3, 7).transpose(2, 3)  # SGLang's layout on a CPU
    caches = SimpleNamespace(
        temporal=torch.randn(2, 5, 4),
        intermediate_ssm=torch.randn(2, 3, 6, 4),
        conv=[convolution],
        intermediate_conv_window=[torch.randn(2, 3, 6, 7, 3)],
    )
    before = caches.temporal.clone()
    slots, steps = torch.tensor([4, 0, 2], dtype=torch.int32), torch.tensor([1, -1, 5])
    commit_states(caches, slots, steps, None, None)
    for row, slot, step in ((0, 4, 1), (2, 2, 5)):
        assert torch.equal(caches.temporal[:, slot], caches.intermediate_ssm[:, row, step])
        assert torch.equal(convolution[:, slot], caches.intermediate_conv_window[0][:, row, step])
    untouched = [0, 1, 3]
    assert torch.equal(caches.temporal[:, untouched], before[:, untouched])
