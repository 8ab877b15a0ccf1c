"""Does the server say what the model says? Served log-probabilities against transformers in float32,
position by position.

Both are teacher-forced: each position predicts its next token from the same given text, so one rounding
difference cannot grow into a different continuation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from server import Server

# Where the reference's best two logits are closer than this, bf16 rounding may choose either.
DECIDED_LOGIT_GAP = 0.25
LEAST_AGREEMENT = 0.99
MOST_MEAN_DELTA = 0.02
# With everything in bfloat16; one of these models with torch alone: 99.65 % and 0.038.
LEAST_AGREEMENT_16_BITS = 0.98
MOST_MEAN_DELTA_16_BITS = 0.06
# With int8 activations, which round to 1/127 of the largest of 32 or 64 neighbours. These tiny random models
# feel it much more than trained ones (doc/accuracy.md): 97.5 % and 0.046 with 4-bit codes.
LEAST_AGREEMENT_INT8 = 0.95
MOST_MEAN_DELTA_INT8 = 0.08


@dataclass(frozen=True)
class Served:
    """What the server answered for `ids`: for each predicted position its best token and the given token's
    log-probability.
    """

    ids: list[int]
    first: int
    best: list[int]
    logprob: list[float]


@dataclass(frozen=True)
class Agreement:
    positions: int
    decided: int
    agreeing: float
    mean_delta: float

    def holds(self) -> bool:
        return self.agreeing >= LEAST_AGREEMENT and self.mean_delta <= MOST_MEAN_DELTA

    def holds_in_16_bits(self) -> bool:
        return self.agreeing >= LEAST_AGREEMENT_16_BITS and self.mean_delta <= MOST_MEAN_DELTA_16_BITS

    def holds_for_int8(self) -> bool:
        return self.agreeing >= LEAST_AGREEMENT_INT8 and self.mean_delta <= MOST_MEAN_DELTA_INT8

    def __str__(self) -> str:
        return (
            f"{self.agreeing:.2%} of {self.decided} decided positions (of {self.positions}) agree, "
            f"mean |delta logprob| {self.mean_delta:.4f}"
        )


def served_prompt(server: Server, ids: list[int]) -> Served:
    """The whole prompt in one prefill (or in chunks, as the server is set)."""
    answer = server.post(
        "/generate",
        input_ids=ids,
        sampling_params={"temperature": 0, "max_new_tokens": 1, "ignore_eos": True},
        return_logprob=True,
        logprob_start_len=0,
        top_logprobs_num=1,
    )
    info = answer["meta_info"]
    # The first token has nothing before it that predicts it.
    return Served(ids, 1, _best(info["input_top_logprobs"][1:]), _given(info["input_token_logprobs"][1:]))


def served_continuation(server: Server, ids: list[int], tokens: int) -> Served:
    """Greedy decoding, one token a step."""
    answer = server.post(
        "/generate",
        input_ids=ids,
        sampling_params={"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True},
        return_logprob=True,
        top_logprobs_num=1,
    )
    info = answer["meta_info"]
    return Served(
        ids + answer["output_ids"],
        len(ids),
        _best(info["output_top_logprobs"]),
        _given(info["output_token_logprobs"]),
    )


def compare(reference: torch.nn.Module, *served: Served) -> Agreement:
    """`reference`: a transformers causal language model in float32."""
    gaps, agree, deltas = [], [], []
    for answer in served:
        with torch.no_grad():
            logits = reference(torch.tensor([answer.ids])).logits[0, answer.first - 1 : -1].float()
        targets = torch.tensor(answer.ids[answer.first :])
        assert len(targets) == len(answer.best) == len(answer.logprob), "the server left out positions"
        top = logits.topk(2).values
        gaps.append(top[:, 0] - top[:, 1])
        agree.append(logits.argmax(-1) == torch.tensor(answer.best))
        expected = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
        deltas.append((expected - torch.tensor(answer.logprob)).abs())
    decided = torch.cat(gaps) > DECIDED_LOGIT_GAP
    return Agreement(
        positions=len(decided),
        decided=int(decided.sum()),
        agreeing=torch.cat(agree)[decided].float().mean().item(),
        mean_delta=torch.cat(deltas).mean().item(),
    )


def _best(entries: list) -> list[int]:
    return [candidates[0][1] for candidates in entries]


def _given(entries: list) -> list[float]:
    return [entry[0] for entry in entries]
