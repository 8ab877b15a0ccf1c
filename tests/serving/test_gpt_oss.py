"""gpt-oss without a GPU: MXFP4 experts with biases, attention with sinks, every other layer with a window.

SGLang computes an MXFP4 model in bfloat16, whatever --dtype says.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny_quantised
import torch
from agreement import compare, served_continuation, served_prompt
from answers import greedy
from server import Server, kt_options, serving
from texts import ENGLISH
from transformers import AutoModelForCausalLM, AutoTokenizer

# The prompt is cut into chunks, most of which begin beyond the window of 32.
OPTIONS = ("--chunked-prefill-size", "128", "--max-total-tokens", "4096", "--kt-activations", "bf16")
CONTINUATIONS = ("The keeper", "Water boils at", "1 2 3 4 5 6 7 8")
PROMPT_TOKENS = 600


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_quantised.build("gpt-oss", tmp_path_factory.mktemp("gpt-oss"))


@pytest.fixture(scope="module")
def server(checkpoint, own_cache, tmp_path_factory) -> Server:
    model = checkpoint / "served"
    log = tmp_path_factory.mktemp("server") / "log"
    with serving(model, log, *kt_options(model), *OPTIONS, environment=own_cache) as server:
        yield server


def test_served_tokens_are_those_of_the_decoded_weights(server, checkpoint):
    assert f"kt-kernel: method MXFP4 from {checkpoint / 'served'}" in server.log_text()
    encoded = AutoTokenizer.from_pretrained(checkpoint / "served")
    answers = [served_prompt(server, encoded(ENGLISH).input_ids[:PROMPT_TOKENS])]
    answers += [served_continuation(server, encoded(text).input_ids, 48) for text in CONTINUATIONS]
    reference = AutoModelForCausalLM.from_pretrained(checkpoint / "decoded", dtype=torch.float32).eval()
    agreement = compare(reference, *answers)
    assert agreement.decided > 300
    assert agreement.holds_in_16_bits(), str(agreement)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if name.endswith(("down_proj_bias", "sinks")):
                parameter.zero_()
    assert not compare(reference, *answers).holds_in_16_bits()


def test_a_prompt_that_was_seen_before_continues_alike(server):
    """What lies beyond the window is given back, and must not be taken for the prefix."""
    first = greedy(server, ENGLISH[:300], 24)
    assert greedy(server, ENGLISH[:300], 24).differs_from(first, tie=0.005) is None


def test_requests_of_different_lengths_are_decoded_together_as_alone(server):
    """Steps are replayed, and find each request's keys within the window."""
    prompts = [ENGLISH[start : start + 40 + 97 * start % 200] for start in range(0, 600, 100)]
    alone = [greedy(server, prompt, 24) for prompt in prompts]
    with ThreadPoolExecutor(len(prompts)) as pool:
        together = list(pool.map(lambda prompt: greedy(server, prompt, 24), prompts))
    for one, other in zip(alone, together, strict=True):
        assert one.differs_from(other, tie=0.05) is None
    assert "decode steps are not replayed" not in server.log_text()
