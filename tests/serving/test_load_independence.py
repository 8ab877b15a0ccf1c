"""An answer's log-probabilities depend on its prompt alone, bit for bit.

Not on what else the server computes at the same time, not on how the prompt was cut into chunks, and not on
how much of it was in the prefix cache. Every kernel of the CPU promises it; one linear layer or norm of torch
among them would break it. With experts on a device long prompts go another way than short ones, with other
rounding: which way, the request decides, and not the batch it is in. A CPU plays the device.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from server import Server, kt_options, serving
from tiny_models import VOCABULARY

PROMPTS = 24
NEW_TOKENS = 12
CHUNK, OTHER_CHUNK = 96, 160
OPTIONS = ("--max-total-tokens", "16384", "--disable-radix-cache")


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint):
    return tiny_checkpoint("qwen3_moe")


def prompt(number: int) -> list[int]:
    """5 to 420 tokens, so that some fit a chunk and some take several; all begin differently."""
    length = 5 + number * 415 // (PROMPTS - 1)
    return [3 + (number * 7919 + place * (31 + number)) % (VOCABULARY - 3) for place in range(length)]


def log_probabilities(server: Server, number: int) -> tuple[tuple, tuple]:
    """Of the prompt's tokens and of the greedy answer's, with the answer's tokens."""
    reply = server.post(
        "/generate",
        input_ids=prompt(number),
        sampling_params={"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True},
        return_logprob=True,
        logprob_start_len=0,
    )
    info = reply["meta_info"]
    of_prompt = tuple(entry[0] for entry in info["input_token_logprobs"])
    return of_prompt, tuple(tuple(entry[:2]) for entry in info["output_token_logprobs"])


def at_once(server: Server, requests: int) -> list[tuple]:
    """The prompts over and over, all at the same time."""
    with ThreadPoolExecutor(requests) as pool:
        return list(pool.map(lambda number: log_probabilities(server, number % PROMPTS), range(requests)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_neighbours_and_chunks_change_no_bit(checkpoint, tmp_path, dtype):
    def cut_into(chunk: int) -> tuple[str, ...]:
        return (*kt_options(checkpoint), *OPTIONS, "--dtype", dtype, "--chunked-prefill-size", str(chunk))

    with serving(checkpoint, tmp_path / "log", *cut_into(CHUNK)) as server:
        alone = [log_probabilities(server, number) for number in range(PROMPTS)]
        assert at_once(server, 16) == alone[:16]
    with serving(checkpoint, tmp_path / "other", *cut_into(OTHER_CHUNK)) as server:
        assert at_once(server, 64) == [alone[number % PROMPTS] for number in range(64)]
    assert len({answer for _, answer in alone}) > PROMPTS // 2, "the answers say too little"


LONG = 100  # of the 24 prompts 18 are as long
HYBRID = ("--kt-gpu-prefill-token-threshold", str(LONG), "--enable-mixed-chunk")


def test_on_a_device_too_neighbours_change_no_bit(checkpoint, tmp_path):
    """64 at once are cut into other chunks than each alone: prompts of up to 420 tokens in chunks of 160."""
    options = (*kt_options(checkpoint, device_experts=5), *OPTIONS, *HYBRID)
    with serving(checkpoint, tmp_path / "log", *options, "--chunked-prefill-size", "160") as server:
        alone = [log_probabilities(server, number) for number in range(PROMPTS)]
        before = server.report()["prefill"]
        assert before["chunks"] > 0 and before["mixed"] == 0
        assert at_once(server, 64) == [alone[number % PROMPTS] for number in range(64)]
        assert server.report()["prefill"]["mixed"] > 0, "no batch had rows of both kinds"
