"""Risk: what only SGLang's sampler can do is lost, or its arguments reach ours mixed up."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from kt_kernel import operators
from kt_kernel.engine import get_engine
from kt_kernel.integrations.sglang import cpu_sampling

TOKENS = 64


class Sampler:
    rl_on_policy_target = None

    def __init__(self) -> None:
        self.synchronised: list = []

    def _preprocess_logits(self, logits: torch.Tensor, _: object) -> torch.Tensor:
        return logits.nan_to_num()

    def _sync_token_ids_across_tp(self, ids: torch.Tensor, _: object) -> None:
        self.synchronised.append(ids)


def info(**changed: object) -> SimpleNamespace:
    plain = {
        "temperatures": torch.tensor([[0.5], [2.0]]),
        "top_ks": torch.tensor([1, 1 << 30], dtype=torch.int32),
        "top_ps": torch.tensor([1.0, 0.0]),
        "min_ps": torch.zeros(2),
        "is_all_greedy": False,
        "sampling_seed": None,
        "sampling_mask_batch_indices": None,
    }
    return SimpleNamespace(**(plain | changed))


def run(
    logits: torch.Tensor, about: SimpleNamespace, *, logprob: bool = False, sampler: Sampler | None = None
):
    """What is drawn, or "stock" with what SGLang's sampler got."""
    operators.install(get_engine(2))
    output = SimpleNamespace(next_token_logits=logits)
    return cpu_sampling.sample(
        lambda *given, **named: ("stock", given[3:], named),
        *(sampler or Sampler(), output, about, logprob, [0, 0], [None, None]),
        positions=torch.zeros(2),
    )


def test_filters_of_each_request_are_its_own():
    logits = torch.randn(2, TOKENS, generator=torch.Generator().manual_seed(3))
    sampler = Sampler()
    drawn = run(logits, info(), sampler=sampler)
    assert drawn.dtype == torch.int32 and drawn.tolist() == logits.argmax(-1).tolist()
    assert sampler.synchronised == [drawn]  # ranks agree on the tokens
    only = torch.full((2, TOKENS), -torch.inf)
    only[0, 5], only[1, 9] = torch.nan, 1.0  # as sanitised logits stand: 0 beats minus infinity
    assert run(only, info(top_ps=torch.ones(2))).tolist() == [5, 9]


def test_random_numbers_are_of_torchs_generator():
    logits, free = (
        torch.zeros(2, TOKENS),
        info(top_ks=torch.full((2,), 1 << 30, dtype=torch.int32), top_ps=torch.ones(2)),
    )
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append([run(logits, free).tolist() for _ in range(4)])
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize(
    "changed",
    [
        {"is_all_greedy": True},
        {"sampling_seed": torch.zeros(2)},
        {"sampling_mask_batch_indices": torch.zeros(1)},
    ],
)
def test_what_ours_cannot_do_stays_stock(changed):
    assert run(torch.zeros(2, TOKENS), info(**changed))[0] == "stock"


def test_probabilities_that_a_client_asks_for_stay_stock():
    what, given, named = run(torch.zeros(2, TOKENS), info(), logprob=True)
    assert what == "stock" and given == (True, [0, 0], [None, None]) and set(named) == {"positions"}
    assert run(torch.zeros(2, TOKENS, dtype=torch.bfloat16), info())[0] == "stock"
