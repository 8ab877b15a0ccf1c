"""The README's promise, through the real server: `kt run demo` answers, streams, and ends on Ctrl-C.

All tests of this server are in this file, some by import, because the tests of one file run in one process.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
from served_clients import *  # noqa: F403
from served_commands import *  # noqa: F403
from served_demo import Demo, wait_until_gone
from served_hostile import *  # noqa: F403
from served_status import *  # noqa: F403

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def demo(demo_checkpoint, tmp_path_factory) -> Iterator[Demo]:
    demo = Demo(demo_checkpoint, tmp_path_factory.mktemp("serve") / "log")
    try:
        demo.wait_until_healthy()
        yield demo
    finally:
        if demo.process.poll() is None:
            demo.stop()


def test_it_knows_the_capital_of_france(demo):
    answer = demo.client.chat.completions.create(model="demo", messages=QUESTION, max_tokens=100)
    assert "Paris" in answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"


def test_the_answer_arrives_in_pieces(demo):
    stream = demo.client.chat.completions.create(model="demo", messages=QUESTION, max_tokens=100, stream=True)
    pieces = [event.choices[0].delta.content or "" for event in stream]
    assert "".join(pieces) == "The capital of France is Paris."
    assert sum(map(bool, pieces)) > 3


def test_it_is_listed_under_its_name(demo):
    assert [model.id for model in demo.client.models.list()] == ["demo"]


def test_the_experts_run_in_our_kernels(demo):
    assert "kt-kernel: method BF16" in demo.log.read_text()


def test_zz_ctrl_c_leaves_no_process_and_no_port(demo):
    processes = demo.descendants()
    assert len(processes) >= 3  # server, scheduler, detokenizer
    assert demo.stop() == 0
    wait_until_gone(processes)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", demo.port))
    assert "Traceback" not in demo.log.read_text()
