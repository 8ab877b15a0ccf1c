"""Risk: a token is drawn that the filters take away, or with another probability than SGLang's."""

from __future__ import annotations

import pytest
import torch
from native_and_twin import native, twin

from kt_kernel.operators.reference.sampling import probabilities

ALL = 1 << 30
DRAWS = 1000
SAMPLE = "kt_kernel::sample"


def one_row(
    logits: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float, rows: int
) -> tuple:
    """The row as often as it is drawn from: arguments of sample, without the random numbers."""
    filters = (torch.full((rows,), top_p), torch.full((rows,), min_p))
    return (
        logits.expand(rows, -1),
        torch.full((rows, 1), temperature),
        torch.full((rows,), top_k, dtype=torch.int32),
        *filters,
    )


def row_of(kind: str, tokens: int) -> torch.Tensor:
    torch.manual_seed(tokens)
    logits = torch.randn(tokens)
    if kind == "flat":
        return logits * 0.01
    if kind == "peaked":
        return logits * 4
    if kind == "masked":
        logits[torch.rand(tokens) < 0.7] = -torch.inf
        return logits
    assert kind == "ties"
    return (logits * 2).round()


FILTERS = [(ALL, 1.0, 0.0), (20, 1.0, 0.0), (ALL, 0.9, 0.0), (ALL, 1.0, 0.05), (30, 0.8, 0.02), (5, 0.0, 0.0)]


@pytest.mark.parametrize("tokens", [7, 300, 2000])
@pytest.mark.parametrize("kind", ["flat", "peaked", "masked", "ties"])
def test_tokens_are_drawn_as_often_as_they_should(kind, tokens):
    uniform = (torch.arange(DRAWS, dtype=torch.float64) + 0.5) / DRAWS
    for temperature, filters in ((0.7, FILTERS), (1.0, FILTERS[:3]), (3.0, FILTERS[3:])):
        for top_k, top_p, min_p in filters:
            arguments = one_row(row_of(kind, tokens), temperature, top_k, top_p, min_p, DRAWS)
            drawn = torch.bincount(native(SAMPLE)(*arguments, uniform), minlength=tokens)
            expected = probabilities(*(one[:1] for one in arguments))[0]
            assert not drawn[expected == 0].any(), (temperature, top_k, top_p, min_p)
            # Of evenly spaced numbers, as many as the probability says, one more or less at each end.
            assert (drawn - DRAWS * expected).abs().max() < 2, (temperature, top_k, top_p, min_p)


def test_a_vocabulary_of_a_real_model_draws_what_its_twin_draws():
    torch.manual_seed(0)
    logits = torch.randn(6, 151936) * torch.tensor([0.1, 1, 3, 5, 8, 2]).view(-1, 1)
    temperatures = torch.tensor([1, 0.6, 1, 0.7, 1, 2.0]).view(-1, 1)
    top_ks = torch.tensor([ALL, ALL, 20, ALL, 1, 50000], dtype=torch.int32)
    top_ps = torch.tensor([1, 0.95, 0.8, 1, 1, 0.99])
    min_ps = torch.tensor([0, 0, 0, 0.1, 0, 0.0])
    for _ in range(2):
        uniform = torch.rand(6, dtype=torch.float64)
        arguments = (logits, temperatures, top_ks, top_ps, min_ps, uniform)
        assert native(SAMPLE)(*arguments).tolist() == twin(SAMPLE)(*arguments).tolist()


def test_what_stays_is_what_sglang_keeps():
    from sglang.srt.layers.sampler import top_k_top_p_min_p_sampling_from_probs_torch as of_sglang

    logits = row_of("peaked", 400)
    for top_k, top_p, min_p in FILTERS[1:]:
        arguments = one_row(logits, 0.8, top_k, top_p, min_p, 1)
        shares = torch.softmax(arguments[0] / 0.8, dim=-1)
        _, weights, tokens, _ = of_sglang(
            *(shares, *arguments[2:], True, None, torch.tensor([0])), return_filtered_probs=True
        )
        kept = set(tokens[0][weights[0] > 0].tolist())
        assert kept == set(probabilities(*arguments)[0].nonzero().flatten().tolist()), (top_k, top_p, min_p)


def test_a_row_is_drawn_alone_as_among_others():
    torch.manual_seed(1)
    logits = torch.randn(9, 3001) * 3
    arguments = (
        *(logits, torch.full((9, 1), 0.9), torch.full((9,), 40, dtype=torch.int32)),
        *(torch.full((9,), 0.9), torch.zeros(9), torch.rand(9, dtype=torch.float64)),
    )
    together = native(SAMPLE)(*arguments)
    alone = [native(SAMPLE)(*(one[i : i + 1] for one in arguments)) for i in range(9)]
    assert together.tolist() == torch.cat(alone).tolist()


def test_first_and_last_token_are_in_reach():
    logits = torch.tensor([[0.0, -torch.inf, 1.0, -torch.inf]])
    for uniform, token in ((0.0, 0), (1 - 1e-16, 2)):
        arguments = one_row(logits, 1.0, ALL, 1.0, 0.0, 1)
        assert native(SAMPLE)(*arguments, torch.tensor([uniform], dtype=torch.float64)).tolist() == [token]


@pytest.mark.parametrize("top_k", [1, 5, ALL])
@pytest.mark.parametrize(("value", "rest"), [(-torch.inf, -torch.inf), (torch.nan, 0.0), (torch.inf, 0.0)])
def test_a_row_that_is_no_numbers_is_refused(value, rest, top_k):
    logits = torch.full((1, 50), rest)
    logits[0, 33] = value
    arguments = one_row(logits, 1.0, top_k, 1.0, 0.0, 1)
    with pytest.raises(ValueError, match="NaN or infinity"):
        native(SAMPLE)(*arguments, torch.zeros(1, dtype=torch.float64))


def test_arguments_of_another_size_or_type_are_refused():
    good = (*one_row(torch.zeros(1, 8), 1.0, ALL, 1.0, 0.0, 2), torch.zeros(2, dtype=torch.float64))
    for place, name in enumerate(("logits", "temperatures", "top_ks", "top_ps", "min_ps", "uniform")):
        wrong = [*good]
        wrong[place] = good[place].half()
        with pytest.raises(ValueError, match=name):
            native(SAMPLE)(*wrong)
    with pytest.raises(ValueError, match="uniform of sample is float64 \\[3\\]"):
        native(SAMPLE)(*good[:5], torch.zeros(3, dtype=torch.float64))
