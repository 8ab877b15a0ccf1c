"""Every weight format through the whole server, in the layout of a published model that uses it.

The dense layers of these models are quantised, too, where the published ones' are.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_quantised
import torch
from agreement import Served, compare, served_continuation, served_prompt
from server import kt_options, serving
from texts import ENGLISH
from transformers import AutoModelForCausalLM, AutoTokenizer

# As in test_model_families.py. The last chunk is shorter than 512, the threshold: it and each new token meet
# the CPU's experts, the chunks before it all experts on the device, decoded.
OPTIONS = (
    *("--dtype", "float32", "--chunked-prefill-size", "512", "--max-total-tokens", "8192"),
    *("--kt-gpu-prefill-token-threshold", "512"),
)
# What is compared strictly is the decoding of weights; int8 activations round more.
STRICT = ("--kt-activations", "bf16")
WHOLE_CHUNKS = 3
CONTINUATIONS = ("The keeper", "Water boils at", "1 2 3 4 5 6 7 8")
TOKENS = 32

# Experts of each layer that SGLang computes: none, or some, for which it must be given decoded weights.
DEVICE_EXPERTS = {"qwen3-gptq-int4": 4, "minimax-m3": 4}


@pytest.fixture(scope="module", params=tiny_quantised.SERVED)
def layout(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def checkpoint(layout: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_quantised.build(layout, tmp_path_factory.mktemp(layout))


@pytest.fixture(scope="module")
def served(layout: str, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Served]:
    model = checkpoint / "served"
    weights = checkpoint / "experts" if (checkpoint / "experts").exists() else model
    log = tmp_path_factory.mktemp("log") / "server.log"
    tokenizer = AutoTokenizer.from_pretrained(model)
    options = kt_options(weights, DEVICE_EXPERTS.get(layout, 0))
    with serving(model, log, *options, *OPTIONS, *STRICT) as server:
        method = tiny_quantised.LAYOUTS[layout].method
        assert f"kt-kernel: method {method} from {weights}" in server.log_text()
        answers = [served_prompt(server, tokenizer(ENGLISH).input_ids)]
        assert server.report()["prefill"]["chunks"] == WHOLE_CHUNKS
        return answers + [
            served_continuation(server, tokenizer(text).input_ids, TOKENS) for text in CONTINUATIONS
        ]


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(checkpoint / "decoded", dtype=torch.float32).eval()


def test_served_tokens_are_those_of_the_decoded_weights(served, reference):
    agreement = compare(reference, *served)
    assert agreement.decided > 300
    assert agreement.holds(), str(agreement)


@pytest.fixture
def slightly_wrong_reference(reference: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The experts' last projections are a tenth too large."""
    experts = [p for name, p in reference.named_parameters() if name.endswith("experts.down_proj")]
    assert experts
    with torch.no_grad():
        for parameter in experts:
            parameter.mul_(1.1)
        yield reference
        for parameter in experts:
            parameter.div_(1.1)


def test_the_comparison_notices_slightly_wrong_experts(served, slightly_wrong_reference):
    agreement = compare(slightly_wrong_reference, *served)
    assert not agreement.holds(), str(agreement)


def test_int8_activations_change_little(tmp_path):
    layout = "kimi-k2-thinking"
    path = tiny_quantised.build(layout, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(path / "served")
    options = (*kt_options(path / "served"), *OPTIONS, "--kt-activations", "int8")
    with serving(path / "served", tmp_path / "server.log", *options) as server:
        answers = [served_prompt(server, tokenizer(ENGLISH).input_ids)]
        answers += [served_continuation(server, tokenizer(text).input_ids, TOKENS) for text in CONTINUATIONS]
    reference = AutoModelForCausalLM.from_pretrained(path / "decoded", dtype=torch.float32).eval()
    agreement = compare(reference, *answers)
    assert agreement.decided > 300
    assert agreement.holds_for_int8(), str(agreement)
