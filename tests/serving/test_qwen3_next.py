"""Qwen3-Next and Qwen3.5 without a GPU: gated delta rules in three of four layers, by our operators.

Their states are easy to get wrong without a word: one that is not kept, or is kept for another request, gives
plausible text.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests
from agreement import compare, served_continuation, served_prompt
from answers import greedy
from server import Server, kt_options, serving
from texts import ENGLISH
from transformers import AutoTokenizer

NEXT, NEWER = "qwen3_next", "qwen3_5_moe"
# 600 tokens in five chunks
OPTIONS = ("--dtype", "float32", "--chunked-prefill-size", "128", "--max-total-tokens", "4096")
CONTINUATIONS = ("The keeper", "Water boils at", "1 2 3 4 5 6 7 8")


@pytest.fixture(scope="module", params=[NEXT, NEWER])
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def server(family, tiny_checkpoint, own_cache, tmp_path_factory) -> Server:
    model = tiny_checkpoint(family)
    log = tmp_path_factory.mktemp("server") / "log"
    with serving(model, log, *kt_options(model), *OPTIONS, environment=own_cache) as server:
        yield server


def flush(server: Server) -> None:
    """SGLang refuses while the last step of a request is being put away."""
    deadline = time.monotonic() + 30
    while not requests.post(f"{server.url}/flush_cache", timeout=60).ok:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_served_tokens_are_the_models_tokens(server, family, tiny_checkpoint, tiny_reference):
    encoded = AutoTokenizer.from_pretrained(tiny_checkpoint(family))
    text = encoded(ENGLISH).input_ids[:600]
    answers = [served_prompt(server, text)]
    answers += [served_continuation(server, encoded(start).input_ids, 32) for start in CONTINUATIONS]
    agreement = compare(tiny_reference(family), *answers)
    assert agreement.decided > 300
    assert agreement.holds(), str(agreement)


def test_a_prompt_that_was_seen_before_continues_with_its_own_state(server):
    """The states of a finished request are found again with its tokens, and no others are."""
    first = greedy(server, ENGLISH[:200], 24)
    again = greedy(server, ENGLISH[:200], 24)
    assert again.differs_from(first, tie=0.005) is None
    longer = ENGLISH[:200] + "".join(chr(ord("a") + i % 26) for i in range(30))
    with_prefix = greedy(server, longer, 24)
    flush(server)
    assert greedy(server, longer, 24).differs_from(with_prefix, tie=0.005) is None


def test_concurrent_requests_keep_their_own_states(server):
    prompts = [ENGLISH[start : start + 40 + 11 * start % 60] for start in range(0, 800, 100)]
    alone = [greedy(server, prompt, 24) for prompt in prompts]
    flush(server)
    with ThreadPoolExecutor(len(prompts)) as pool:
        together = list(pool.map(lambda prompt: greedy(server, prompt, 24), prompts))
    wrong = [mine.differs_from(other, tie=0.02) for mine, other in zip(alone, together, strict=True)]
    assert wrong == [None] * len(prompts)
    assert "decode steps are not replayed" not in server.log_text()
