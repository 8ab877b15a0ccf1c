"""One server that does everything at once: experts on the device that move at every step, long prompts that
meet whole layers, and CPU experts that fail when told to. The tests run in this order.
"""

from __future__ import annotations

import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import failing_experts
import pytest
import requests
import torch
from agreement import DECIDED_LOGIT_GAP, compare, served_continuation, served_prompt
from answers import Answer, events, greedy, streamed
from endings import end_and_check, kill_and_check, process_named
from server import Server, kt_options, serving
from texts import ENGLISH
from transformers import AutoTokenizer

from kt_kernel.hybrid.activation import read_activation_counts

FAMILY = "qwen3_moe"
LAYERS, EXPERTS = 4, 16
THRESHOLD = 100
CHUNK = 128
TOKENS = 24

OPTIONS = (
    *("--dtype", "float32", "--chunked-prefill-size", str(CHUNK), "--max-total-tokens", "16384"),
    *("--kt-gpu-experts-ratio", "0.3", "--kt-expert-placement-strategy", "random"),
    *("--kt-gpu-prefill-token-threshold", str(THRESHOLD)),
    *("--kt-enable-dynamic-expert-update", "--kt-expert-update-interval", "1"),
    *("--kt-miss-policy", "auto", "--record-kt-gpu-expert-distribution", "--kt-verify", "50"),
)
PROMPTS = [ENGLISH[start : start + 30 + 7 * start % 50] for start in range(0, 1600, 100)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("server")


@pytest.fixture(scope="module")
def server(tiny_checkpoint, folder, own_cache) -> Server:
    model = tiny_checkpoint(FAMILY)
    (folder / "plugin").mkdir()
    environment = failing_experts.install(folder / "plugin")
    environment["SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR"] = str(folder)
    environment |= own_cache
    options = (*kt_options(model), *OPTIONS)
    with serving(model, folder / "server.log", *options, environment=environment) as server:
        yield server


@pytest.fixture(scope="module")
def alone(server) -> list[Answer]:
    return [greedy(server, prompt, TOKENS) for prompt in PROMPTS]


def forget(server: Server) -> None:
    """Empty the prefix cache, as soon as nothing runs any more."""
    deadline = time.monotonic() + 30
    while not requests.post(f"{server.url}/flush_cache", timeout=60).ok:
        assert time.monotonic() < deadline, server.log_tail()
        time.sleep(0.1)


def test_the_start_says_what_memory_is_for(server):
    """A layer's 16 experts of 3 x 256 x 128 in float32, twice for prompts; 0.3 of 64 experts reside."""
    slot = 3 * 256 * 128 * 4
    memory = {row["what"]: row for row in server.report()["memory"]}
    assert memory["slots of layerwise prefill"]["bytes"] == 2 * EXPERTS * slot
    assert memory["resident experts"]["bytes"] == int(0.3 * LAYERS * EXPERTS) * slot
    assert memory["CPU experts, packed"]["where"] == "host"
    assert server.log_text().count("memory of experts on rank 0:") == 1
    for what in memory:
        assert f"\n  {what} " in server.log_text()


def test_sixteen_streams_while_experts_move(server, alone):
    forget(server)
    moved = server.report()["experts_moved"]
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        together = list(pool.map(lambda prompt: streamed(server, prompt, TOKENS), PROMPTS))
    assert server.report()["experts_moved"] > moved
    wrong = [mine.differs_from(other, DECIDED_LOGIT_GAP) for mine, other in zip(alone, together, strict=True)]
    assert wrong == [None] * len(PROMPTS)
    same = sum(mine.tokens == other.tokens for mine, other in zip(alone, together, strict=True))
    assert same >= len(PROMPTS) / 2


def test_a_second_turn_finds_its_prefix_and_answers_the_same(server, tiny_checkpoint, tiny_reference):
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint(FAMILY))
    first = tokenizer(ENGLISH[:400]).input_ids
    reply = greedy(server, first, TOKENS)
    second = first + reply.tokens + tokenizer(" And then the fog came in again.").input_ids
    with_prefix = greedy(server, second, TOKENS)
    assert with_prefix.cached >= len(first)
    agreement = compare(tiny_reference(FAMILY), served_continuation(server, second, TOKENS))
    assert agreement.agreeing == 1.0, str(agreement)
    forget(server)
    anew = greedy(server, second, TOKENS)
    assert anew.cached == 0
    assert with_prefix.differs_from(anew, DECIDED_LOGIT_GAP) is None


def test_prompts_given_up_in_the_middle_leave_the_server_right(server, tiny_checkpoint, tiny_reference):
    """Eight long prompts, one after the other in a dozen chunks each, all given up after the first few."""
    forget(server)
    begun = server.report()["prefill"]["chunks"]
    prompts = [f"{number} {ENGLISH}" for number in range(8)]
    with ThreadPoolExecutor(len(prompts)) as pool:
        replies = [pool.submit(lambda p=prompt: list(events(server, p, TOKENS))[-1]) for prompt in prompts]
        while server.report()["prefill"]["chunks"] < begun + 3:
            time.sleep(0.01)
        assert requests.post(f"{server.url}/abort_request", json={"abort_all": True}, timeout=60).ok
        endings = [reply.result()["meta_info"]["finish_reason"]["type"] for reply in replies]
    assert endings.count("abort") >= 4, endings
    assert server.report()["prefill"]["chunks"] < begun + 8 * len(ENGLISH) // CHUNK
    forget(server)
    text = AutoTokenizer.from_pretrained(tiny_checkpoint(FAMILY))(ENGLISH).input_ids
    agreement = compare(tiny_reference(FAMILY), served_prompt(server, text))
    assert agreement.holds(), str(agreement)


def test_the_expert_distribution_is_recorded_for_the_next_start(server, folder):
    def tell(what: str) -> None:
        assert requests.post(f"{server.url}/{what}_expert_distribution_record", timeout=60).ok

    tell("dump")  # nothing was recorded: a line in the log, no file, and the server lives
    assert not list(folder.glob("gpu_expert_distribution_*.pt"))
    tell("start")
    greedy(server, PROMPTS[0], TOKENS)
    tell("stop")
    greedy(server, PROMPTS[1], TOKENS)
    tell("dump")
    (file,) = folder.glob("gpu_expert_distribution_*.pt")
    counts = read_activation_counts(file, LAYERS, EXPERTS)
    # Top-4 routing of the prompt but for a cached part, and of all new tokens but the last.
    assert (counts.sum(1) == counts[0].sum()).all()
    assert 4 * (TOKENS - 1) < counts[0].sum() <= 4 * (len(PROMPTS[0]) + TOKENS)
    masks = torch.load(file, weights_only=True)["gpu_expert_masks"]
    assert masks.shape[1:] == (LAYERS, EXPERTS) and masks.any()


# ---- CPU experts that fail --------------------------------------------------------------------

SENTENCE = f"{EXPERTS + 7}"  # names the expert that there is not


@pytest.fixture
def fail_once(folder) -> Path:
    """A file to be touched: the next call of any layer's CPU experts then fails."""
    return failing_experts.switch(folder / "plugin")


def refused(server: Server, prompt: str) -> str:
    """What the server says of a request that must end with an error."""
    body = {"text": prompt, "sampling_params": {"temperature": 0, "max_new_tokens": TOKENS}}
    reply = requests.post(f"{server.url}/generate", json=body, timeout=60)
    assert reply.status_code == 500, reply.text
    return reply.text


def test_failed_experts_end_their_request_and_nothing_else(server, alone, fail_once):
    forget(server)
    fail_once.touch()
    assert SENTENCE in refused(server, PROMPTS[2])
    assert not fail_once.exists()
    after = greedy(server, PROMPTS[2], TOKENS)
    assert after.cached == 0, "what a failed request computed must not be found by the next"
    assert alone[2].differs_from(after, DECIDED_LOGIT_GAP) is None


def test_a_failure_between_two_tokens_ends_the_stream_with_the_sentence(server, alone, fail_once):
    stream = events(server, PROMPTS[3], 400)
    begun = list(itertools.islice(stream, 5))
    fail_once.touch()
    *_, last = stream
    reason = last["meta_info"]["finish_reason"] if "meta_info" in last else last["error"]
    assert SENTENCE in reason["message"]
    assert len(begun[-1]["output_ids"]) < 400
    after = greedy(server, PROMPTS[3], TOKENS)
    assert alone[3].differs_from(after, DECIDED_LOGIT_GAP) is None


def test_a_chunk_that_fails_on_its_way_to_the_device_leaves_nothing_in_the_prefix_cache(server, folder):
    """The first of five chunks: its experts cannot be written for the device."""
    forget(server)
    failing_experts.switch(folder / "plugin", failing_experts.WRITING).touch()
    prompt = ENGLISH[: 5 * CHUNK]
    assert SENTENCE in refused(server, prompt)
    assert greedy(server, prompt, 4).cached == 0
    assert server.report()["prefill"]["fallbacks"] == 0


def test_requests_beside_a_failing_one_are_answered_or_told(server, alone, fail_once):
    """All of a failing batch end with the sentence; whoever was not in it gets the right answer."""
    forget(server)
    answers: dict[int, Answer | str] = {}

    def ask(number: int) -> None:
        try:
            answers[number] = greedy(server, PROMPTS[number], TOKENS)
        except AssertionError as error:
            answers[number] = str(error)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(PROMPTS))]
    for thread in threads:
        thread.start()
    fail_once.touch()
    for thread in threads:
        thread.join()
    failed = [answer for answer in answers.values() if isinstance(answer, str)]
    assert failed and all(answer.startswith("500") and SENTENCE in answer for answer in failed)
    assert all(
        alone[number].differs_from(answer, DECIDED_LOGIT_GAP) is None
        for number, answer in answers.items()
        if isinstance(answer, Answer)
    )
    assert alone[5].differs_from(greedy(server, PROMPTS[5], TOKENS), DECIDED_LOGIT_GAP) is None


@pytest.mark.parametrize("what", [failing_experts.MODEL, failing_experts.SAMPLER])
@pytest.mark.parametrize(
    "wants", [{}, {"return_logprob": True, "top_logprobs_num": 2, "logprob_start_len": 0}]
)
def test_an_exception_of_sglangs_own_code_ends_its_batch_and_nothing_else(server, alone, folder, what, wants):
    """In the middle of an answer, and in the middle of a prompt of several chunks."""
    for prompt in (PROMPTS[4], ENGLISH[: 3 * CHUNK]):
        forget(server)
        failing_experts.switch(folder / "plugin", what).touch()
        body = {"text": prompt, "sampling_params": {"temperature": 0, "max_new_tokens": TOKENS}, **wants}
        reply = requests.post(f"{server.url}/generate", json=body, timeout=60)
        assert reply.status_code == 500 and f"IndexError: {what} made to fail" in reply.text, reply.text
    after = greedy(server, PROMPTS[4], TOKENS)
    assert after.cached == 0
    assert alone[4].differs_from(after, DECIDED_LOGIT_GAP) is None


@pytest.mark.parametrize("what", [failing_experts.MODEL, failing_experts.SAMPLER])
def test_an_exception_between_two_tokens_ends_the_stream(server, alone, folder, what):
    stream = events(server, PROMPTS[3], 400)
    begun = list(itertools.islice(stream, 5))
    failing_experts.switch(folder / "plugin", what).touch()
    *_, last = stream
    reason = last["meta_info"]["finish_reason"] if "meta_info" in last else last["error"]
    assert "made to fail" in reason["message"]
    assert len(begun[-1]["output_ids"]) < 400
    assert alone[3].differs_from(greedy(server, PROMPTS[3], TOKENS), DECIDED_LOGIT_GAP) is None


# ---- faults made on purpose (kt_kernel/faults.py) ------------------------------------------------


@pytest.mark.parametrize(
    ("point", "sentence", "of_an_update"),
    [
        ("queue-task", "a queued task was made to fail", None),
        ("device-copy", "to the device failed: made to fail", "they stay on the CPU until the next update"),
        ("copy-job", "copying experts was made to fail", "they stay on the CPU until the next update"),
    ],
)
def test_a_fault_ends_its_batch_and_nothing_else(server, alone, folder, point, sentence, of_an_update):
    """Of the copies, some are an update's, which nobody waits for: its experts stay on the CPU."""
    forget(server)
    before = len(server.log_text())
    failing_experts.arm(folder / "plugin", point)
    body = {"text": ENGLISH[: 5 * CHUNK], "sampling_params": {"temperature": 0, "max_new_tokens": TOKENS}}
    reply = requests.post(f"{server.url}/generate", json=body, timeout=60)
    if reply.ok:
        assert of_an_update is not None and of_an_update in server.log_text()[before:]
    else:
        assert reply.status_code == 500 and sentence in reply.text, reply.text
    assert alone[2].differs_from(greedy(server, PROMPTS[2], TOKENS), DECIDED_LOGIT_GAP) is None


# ---- two ranks --------------------------------------------------------------------------------


def test_two_ranks_say_the_same_as_one(server, alone, tiny_checkpoint, tiny_reference, own_cache, tmp_path):
    """The first server stands idle meanwhile."""
    model = tiny_checkpoint(FAMILY)
    tokenizer = AutoTokenizer.from_pretrained(model)
    (tmp_path / "plugin").mkdir()
    environment = {**failing_experts.install(tmp_path / "plugin"), **own_cache}
    options = (*kt_options(model), *OPTIONS, "--tp-size", "2", "--kt-cpuinfer", "1")
    with serving(model, tmp_path / "log", *options, environment=environment) as ranks:
        assert requests.post(f"{ranks.url}/start_expert_distribution_record", timeout=60).ok
        answers = [greedy(ranks, prompt, TOKENS) for prompt in PROMPTS[:6]]
        agreement = compare(tiny_reference(FAMILY), served_prompt(ranks, tokenizer(ENGLISH).input_ids))
        failing_experts.switch(tmp_path / "plugin").touch()
        assert SENTENCE in refused(ranks, PROMPTS[6])
        answers.append(greedy(ranks, PROMPTS[6], TOKENS))
        report = ranks.report()
        end_and_check(
            ranks,
            lambda: failing_experts.arm(tmp_path / "plugin", "rank-death"),
            "the process scheduler_1 of this server ended (exit code -9, SIGKILL",
            # The other rank may lose its connection, and end the server, before anybody looks.
            "by peer",  # closed or reset
        )
    wrong = [
        mine.differs_from(other, DECIDED_LOGIT_GAP) for mine, other in zip(alone[:7], answers, strict=True)
    ]
    assert wrong == [None] * 7
    assert agreement.holds(), str(agreement)
    assert report["experts_moved"] > 0 and report["prefill"]["chunks"] > 0


def test_z_what_was_verified_meanwhile_was_right(server):
    deadline = time.monotonic() + 120
    while (verified := server.report()["verify"])["checked"] < 20:
        assert time.monotonic() < deadline, verified
        greedy(server, PROMPTS[0], TOKENS)
    assert verified["wrong"] == verified["failed"] == 0
    assert "computed a token wrongly" not in server.log_text()


def test_zz_a_detokenizer_that_dies_ends_the_server(server):
    process = process_named(server, "detokenizer")
    kill_and_check(server, process, "the process detokenizer of this server ended (exit code -9, SIGKILL")
