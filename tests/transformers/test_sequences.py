"""Each sequence of a batch counts alone."""

from __future__ import annotations

import torch

from kt_kernel.integrations.transformers.sequences import requests_of

THRESHOLD = 10


def streamed(*arguments, **options) -> list[int] | None:
    requests = requests_of(arguments, options, THRESHOLD)
    return None if requests is None else [request.streamed for request in requests]


def test_short_sequences_together_are_no_long_one():
    ids = torch.zeros(3, 9, dtype=torch.long)
    assert streamed(ids) == streamed(input_ids=ids) == [0, 0, 0]
    assert streamed(torch.zeros(2, 10, dtype=torch.long)) == [10, 10]
    assert streamed(inputs_embeds=torch.zeros(2, 12, 64)) == [12, 12]


def test_padding_does_not_count_and_goes_with_its_sequence():
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, :3] = 0
    assert streamed(torch.zeros(2, 12, dtype=torch.long), attention_mask=mask) == [12, 0]
    cached = torch.cat([torch.ones(2, 50, dtype=torch.long), mask], dim=1)
    assert streamed(torch.zeros(2, 12, dtype=torch.long), attention_mask=cached) == [12, 0]


def test_a_padded_sequence_alone_goes_the_way_that_it_goes_in_a_batch():
    mask = torch.ones(1, 12, dtype=torch.long)
    assert streamed(torch.zeros(1, 12, dtype=torch.long), attention_mask=mask) is None
    mask[0, :3] = 0
    assert streamed(torch.zeros(1, 12, dtype=torch.long), attention_mask=mask) == [0]


def test_masks_of_every_kind_tell_padding():
    ids = torch.zeros(2, 12, dtype=torch.long)
    seen = torch.ones(2, 12, dtype=torch.bool)
    seen[1, :3] = False
    causal = seen[:, None, None] & torch.ones(12, 12, dtype=torch.bool).tril()
    added = torch.where(causal, 0.0, float("-inf"))
    for mask in (seen.long(), causal, added, {"sliding_attention": None, "full_attention": added}):
        assert streamed(ids, attention_mask=mask) == [12, 0]
        assert streamed(ids, mask) == [12, 0]
    assert streamed(ids, attention_mask={"block": None}) == streamed(ids, None) == [12, 12]


def test_one_sequence_or_no_threshold_is_left_to_the_call():
    assert streamed(torch.zeros(1, 50, dtype=torch.long)) is None
    assert streamed() is None
    assert requests_of((torch.zeros(2, 50, dtype=torch.long),), {}, 0) is None
