"""What a token's sums are depends on its request alone, not on the requests beside it in a pass."""

from __future__ import annotations

import pytest
import torch
from hybrid_models import (
    DECODER_LAYERS,
    EXPERTS,
    HIDDEN,
    MOE_LAYERS,
    TOP_K,
    Engine,
)

from kt_kernel.hybrid.options import HybridOptions
from kt_kernel.hybrid.pass_rows import PassRows, RequestRows, streamed_tokens
from kt_kernel.hybrid.torch_experts import TorchDeviceExperts

THRESHOLD = 10
RESIDENT = (2, 5)
LAYER = MOE_LAYERS[0]


@pytest.mark.parametrize(
    ("length", "threshold", "chunk", "expected"),
    [
        (9, 10, None, 0),
        (10, 10, None, 10),
        (10, 0, None, 0),
        (25, 10, 16, 16),  # a last chunk of 9
        (26, 10, 16, 26),
        (32, 10, 16, 32),
        (40, 20, 16, 0),  # no chunk is so long
        (0, 1, None, 0),
        (-3, 1, 16, 0),
    ],
)
def test_how_much_of_a_prompt_is_streamed(length, threshold, chunk, expected):
    assert streamed_tokens(length, threshold, chunk) == expected


def test_rows_beyond_the_requests_fill_up_and_a_call_with_fewer_is_of_another_pass():
    rows = PassRows([RequestRows(3, 0), RequestRows(4, 2)], torch.device("cpu"))
    split = rows.split(9)
    assert (split.streamed.tolist(), split.others.tolist()) == ([3, 4], [0, 1, 2, 5, 6, 7, 8])
    assert rows.split(6) is None
    assert PassRows([RequestRows(4, 4)], torch.device("cpu")).split(4).others is None
    assert PassRows([], torch.device("cpu")).split(100) is None


def tokens(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(count, HIDDEN, generator=generator)
    scores = torch.rand(count, EXPERTS, generator=generator).softmax(-1)
    weights, ids = scores.topk(TOP_K)
    return hidden, ids, weights


class _RowByRow(TorchDeviceExperts):
    """A device whose result for a row does not depend on the others, as torch's products may."""

    def compute(self, hidden, slots, weights):
        rows = zip(hidden.split(1), slots.split(1), weights.split(1), strict=True)
        results = [super(_RowByRow, self).compute(*row) for row in rows]
        return torch.cat(results) if results else torch.empty_like(hidden)


def engine(**options) -> Engine:
    masks = torch.zeros(DECODER_LAYERS, EXPERTS, dtype=torch.bool)
    masks[:, list(RESIDENT)] = True
    return Engine(masks, HybridOptions(prefill_threshold=THRESHOLD, **options), device_experts=_RowByRow)


@pytest.mark.parametrize("options", [{}, {"update_after_prefill": True}], ids=["fixed", "updated"])
def test_a_request_beside_others_gets_the_bits_that_it_gets_alone(options):
    lengths = (4, THRESHOLD, 1, 23, 9)  # the 23 with 17 that are streamed
    streamed = (0, THRESHOLD, 0, 17, 0)
    parts = [tokens(length, seed) for seed, length in enumerate(lengths)]
    requests = [RequestRows(*pair) for pair in zip(lengths, streamed, strict=True)]
    with engine(**options) as served:
        layer = served.layers[LAYER]
        placement = layer.placement.current
        alone = []
        for part, request in zip(parts, requests, strict=True):
            served.model.begin_step([request])
            alone.append(layer.forward(*part))
        runs = len(served.cpu_runs)
        served.model.begin_step(requests)
        together = layer.forward(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
        assert len(served.cpu_runs) == runs + 1
        assert len(served.cpu_runs[-1].ids) == sum(lengths) - sum(streamed)
        if options:  # what resides, and so rounding, has changed meanwhile
            assert layer.placement.current is not placement
            assert torch.allclose(together, torch.cat(alone), rtol=0.05, atol=0.05)
        else:
            assert torch.equal(together, torch.cat(alone))
        assert int(layer.statistics.totals().sum()) == 2 * sum(lengths) * TOP_K


def test_the_two_ways_of_a_token_differ_in_bits():
    """Else the test above could not see anything."""
    part = tokens(THRESHOLD, 1)
    with engine() as served:
        results = []
        for streamed in (0, THRESHOLD):
            served.model.begin_step([RequestRows(THRESHOLD, streamed)])
            results.append(served.layers[LAYER].forward(*part))
    assert not torch.equal(*results)
    assert torch.allclose(*results, rtol=0.05, atol=0.05)


def test_many_short_prompts_are_no_long_one():
    with engine() as served:
        served.model.begin_step([RequestRows(3, 0)] * 20)
        served.layers[LAYER].forward(*tokens(60, 3))
        assert served.model.prefill.chunks == 0
        served.model.begin_step([])  # a decode step of many requests
        served.layers[LAYER].forward(*tokens(60, 4))
        assert served.model.prefill.chunks == 0
