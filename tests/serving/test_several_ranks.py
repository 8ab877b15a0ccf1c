"""One model on several ranks, stages and hosts: what the server says is what the model says, each process has
its part of the experts alone, and a host that is gone does not leave the other waiting.

rank_grid.py, a program, compares every format, placement and way; here are some of its cells.
test_hybrid_server.py serves on two ranks what moves its experts.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import failing_experts
import pytest
import requests
import tiny_quantised
import torch
from agreement import compare, served_continuation, served_prompt
from answers import greedy
from rank_grid import OPTIONS, on_two_hosts
from server import Server, kt_options, serving
from texts import ENGLISH
from transformers import AutoModelForCausalLM, AutoTokenizer
from two_hosts import FIRST, SECOND, TwoHosts, two_hosts

TOKENS = 24
# The watch waits for 15 s of silence; SGLang's processes then take some seconds to end. It only ends a hang.
PATIENCE_SECONDS = 120

_MEMORY = re.compile(r"CPU experts, packed +host +([\d.]+) MB")


@pytest.fixture(scope="session")
def quantised(tmp_path_factory):
    """A layout's checkpoints: the one that is served, and the same decoded."""
    root = tmp_path_factory.mktemp("several-ranks")
    made: dict[str, Path] = {}

    def build(layout: str) -> Path:
        if layout not in made:
            made[layout] = tiny_quantised.build(layout, root / layout)
        return made[layout]

    return build


def _assert_says_what_the_model_says(server: Server, model: Path, decoded: Path) -> None:
    reference = AutoModelForCausalLM.from_pretrained(decoded, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(model)(ENGLISH).input_ids
    agreement = compare(reference, served_prompt(server, ids), served_continuation(server, ids[:20], TOKENS))
    assert agreement.holds(), str(agreement)


def _expert_bytes(log: str) -> list[float]:
    """MB of each process that has CPU experts."""
    return [float(found) for found in _MEMORY.findall(log)]


# ---- ranks ----------------------------------------------------------------------------------


def test_two_ranks_whose_experts_are_all_on_the_device_say_what_the_model_says(quantised, tmp_path):
    """A 4-bit format, of which each rank fills its shard of the device's experts from its share."""
    folder = quantised("kimi-k2-thinking")
    model = folder / "served"
    options = (*kt_options(model, 16), *OPTIONS, "--tp-size", "2")
    with serving(model, tmp_path / "log", *options) as server:
        _assert_says_what_the_model_says(server, model, folder / "decoded")


# ---- stages -----------------------------------------------------------------------------------


def test_each_stage_of_a_pipeline_serves_its_own_layers_and_one_that_fails_ends_all(
    tiny_checkpoint, tmp_path
):
    model, plugin = tiny_checkpoint("qwen3_moe"), tmp_path / "plugin"
    plugin.mkdir()
    options = (*kt_options(model, 3), *OPTIONS, "--pp-size", "2")
    with serving(model, tmp_path / "log", *options, environment=failing_experts.install(plugin)) as server:
        _assert_says_what_the_model_says(server, model, model)
        layers = [layer["layer"] for layer in server.report()["layers"]]
        sizes = _expert_bytes(server.log_text())
        failing_experts.switch(plugin).touch()
        with contextlib.suppress(requests.RequestException):
            greedy(server, "The keeper", 2)
        assert server.wait_until_gone(PATIENCE_SECONDS) != 0
        assert "a stage of the pipeline cannot go on: layer " in server.log_text()
    assert layers == [0, 1]
    assert len(sizes) == 2 and sizes[0] == sizes[1] > 0


# ---- hosts ------------------------------------------------------------------------------------


@pytest.fixture
def hosts(tmp_path_factory) -> Iterator[TwoHosts]:
    try:
        with two_hosts(tmp_path_factory.mktemp("hosts")) as made:
            yield made
    except OSError as error:
        pytest.skip(f"NOT RUN: no second network namespace can be made here ({error})")


def test_two_hosts_say_what_one_says_and_notice_when_the_other_is_gone(quantised, hosts, tmp_path):
    folder = quantised("deepseek-v3")
    model = folder / "served"
    options = (*kt_options(model), *OPTIONS, "--tp-size", "2")
    with on_two_hosts(model, tmp_path, hosts, *options) as (first, second):
        _assert_says_what_the_model_says(first, model, folder / "decoded")
        sizes = [_expert_bytes(server.log_text()) for server in (first, second)]
        assert sizes[0] == sizes[1] and len(sizes[0]) == 1  # MB with one decimal
        hosts.cut()
        with contextlib.suppress(requests.RequestException):
            requests.get(f"{first.url}/health_generate", timeout=PATIENCE_SECONDS)
        assert first.wait_until_gone(PATIENCE_SECONDS) != 0
        second.wait_until_gone(PATIENCE_SECONDS)
        assert f"host 1 ({SECOND}) has not been heard for 15 s, so this server ends" in first.log_text()
        assert f"host 0 ({FIRST}) has not been heard for 15 s, so this server ends" in second.log_text()
