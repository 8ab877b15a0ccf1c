"""One server through its life: chat, streaming, limits, idling, Ctrl-C. The tests run in this order."""

from __future__ import annotations

import ipaddress
import json
import os
import time
from pathlib import Path

import pytest
import requests
from endings import addresses_listened_on, left_of, server_name
from server import Server, kt_options, serving
from texts import ENGLISH

CONTEXT = 2048  # of the tiny models
IDLE_SECONDS = 20


@pytest.fixture(scope="module")
def server(tiny_checkpoint, tmp_path_factory) -> Server:
    model = tiny_checkpoint("qwen3_moe")
    log = tmp_path_factory.mktemp("log") / "server.log"
    # A chunk smaller than most prompts here; no size of the KV cache, so ours is chosen.
    with serving(
        model, log, *kt_options(model), "--dtype", "float32", "--chunked-prefill-size", "64"
    ) as server:
        yield server


def chat(server: Server, **options: object) -> dict:
    message = {"role": "user", "content": "Say something."}
    return server.post(
        "/v1/chat/completions", model="any", messages=[message], temperature=0, max_tokens=24, **options
    )


def test_start_names_the_kernels_and_bounds_the_cache(server):
    log = server.log_text()
    assert "kernels for BF16:" in log
    assert f"--max-total-tokens is not given: {4 * CONTEXT} tokens of KV cache" in log
    assert "Traceback" not in log


def test_chat_streams_the_same_text(server):
    whole = chat(server)["choices"][0]["message"]["content"]
    streamed = ""
    body = {"model": "any", "messages": [{"role": "user", "content": "Say something."}]}
    body |= {"temperature": 0, "max_tokens": 24, "stream": True}
    with requests.post(f"{server.url}/v1/chat/completions", json=body, stream=True, timeout=60) as answer:
        events = [line[6:] for line in answer.iter_lines() if line.startswith(b"data: ")]
    assert events[-1] == b"[DONE]"
    for event in events[:-1]:
        for choice in json.loads(event)["choices"]:
            streamed += choice["delta"].get("content") or ""
    assert len(events) > 3, "one event for everything is no stream"
    assert streamed == whole


def test_a_prompt_longer_than_a_chunk_is_cut_not_refused(server):
    sampling = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
    answer = server.post("/generate", text=ENGLISH, sampling_params=sampling)
    assert answer["meta_info"]["prompt_tokens"] > 1000
    assert len(answer["output_ids"]) == 8


def test_more_tokens_than_the_context_is_one_clear_error_and_the_server_lives(server):
    answer = requests.post(f"{server.url}/generate", json={"text": "x" * (CONTEXT + 100)}, timeout=60)
    assert answer.status_code == 400
    assert str(CONTEXT) in answer.json()["error"]["message"]
    assert chat(server)["choices"]


def test_more_running_requests_than_a_chunk_has_tokens(server):
    """A decode step has one token per request, and the chunk size here is 64."""
    sampling = {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True}
    answers = server.post("/generate", text=["The keeper"] * 80, sampling_params=sampling)
    assert len({tuple(answer["output_ids"]) for answer in answers}) == 1


def test_packed_weights_are_neither_replaced_nor_read_as_matrices(server, tiny_checkpoint):
    body = {"model_path": str(tiny_checkpoint("qwen3_moe"))}
    answer = requests.post(f"{server.url}/update_weights_from_disk", json=body, timeout=60)
    assert answer.json()["success"] is False and "packed" in answer.json()["message"]
    name = "model.layers.0.self_attn.o_proj.weight"
    requests.post(f"{server.url}/get_weights_by_name", json={"name": name}, timeout=60)
    assert "packed and cannot be read" in server.log_text()
    assert chat(server)["choices"]


def test_an_idle_server_leaves_the_cpu_alone(server):
    time.sleep(2)  # whatever the last request left to do
    before = cpu_seconds(server.processes())
    time.sleep(IDLE_SECONDS)
    used = cpu_seconds(server.processes()) - before
    assert used / IDLE_SECONDS < 0.01, f"{used / IDLE_SECONDS:.2%} of a core"


def test_it_listens_on_the_loopback_interface_alone(server):
    """Stock SGLang's torch store on all interfaces lets anybody in the network replace its keys."""
    addresses = addresses_listened_on(server)
    assert len(addresses) >= 1
    assert all(ipaddress.ip_address(address).is_loopback for address in addresses), addresses


def test_a_web_page_may_not_ask(server):
    """The browser asks the server first, and wants to be told that the page may."""
    asked = {"Origin": "https://example.org", "Access-Control-Request-Method": "POST"}
    answer = requests.options(f"{server.url}/generate", headers=asked, timeout=60)
    assert "access-control-allow-origin" not in answer.headers


def test_ctrl_c_leaves_no_process_no_port_and_no_stack_trace(server):
    name = server_name(server)
    assert left_of(name)
    server.interrupt()
    server.wait_until_gone(30)
    assert not server.is_listening()
    assert not left_of(name)
    assert "Traceback" not in server.log_text()


def cpu_seconds(processes: list[int]) -> float:
    """User and system time of the processes since they started."""
    ticks = 0
    for process in processes:
        user, system = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11:13]
        ticks += int(user) + int(system)
    return ticks / os.sysconf("SC_CLK_TCK")
