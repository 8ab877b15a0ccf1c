"""Risk: what was trained is not what is served. An adapter goes from training to disk to the real server."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from agreement import compare, served_continuation, served_prompt
from peft import LoraConfig, PeftModel, get_peft_model
from server import Server, kt_options, serving
from texts import ENGLISH
from transformers import AutoModelForCausalLM, AutoTokenizer

import kt_kernel.training as training
from kt_kernel.errors import CheckpointError
from kt_kernel.integrations.sglang.served_adapter import Adapter, _added

STEPS = 60
KNOWN = 6  # tokens of the lesson that the server is given
SERVED = ("--dtype", "float32", "--max-total-tokens", "4096")


@pytest.fixture(scope="module")
def lesson(tiny_checkpoint) -> list[int]:
    """Twenty tokens in an order that no model expects."""
    size = AutoTokenizer.from_pretrained(tiny_checkpoint("qwen3_moe")).vocab_size
    return torch.randperm(size, generator=torch.Generator().manual_seed(4))[:20].tolist()


@pytest.fixture(scope="module")
def adapter(tiny_checkpoint, lesson, tmp_path_factory) -> Path:
    """Trained until the lesson is known by heart."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of matrices that are too small to share
    torch.manual_seed(0)
    base = training.load(AutoModelForCausalLM, tiny_checkpoint("qwen3_moe"), dtype=torch.float32, threads=2)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(base, training.lora_config(config)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = torch.tensor([lesson])
    losses = []
    for _ in range(STEPS):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if losses[-1] < 0.05:
            break
    torch.set_num_threads(threads)
    assert losses[-1] < 0.1 * losses[0]
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def prompt(tiny_checkpoint) -> list[int]:
    return AutoTokenizer.from_pretrained(tiny_checkpoint("qwen3_moe"))(ENGLISH).input_ids[:240]


def answers_of(server: Server, prompt: list[int]):
    return served_prompt(server, prompt), served_continuation(server, prompt[:40], 16)


def says_the_lesson(server: Server, lesson: list[int]) -> bool:
    sampling = {"temperature": 0, "max_new_tokens": len(lesson) - KNOWN, "ignore_eos": True}
    said = server.post("/generate", input_ids=lesson[:KNOWN], sampling_params=sampling)["output_ids"]
    return said == lesson[KNOWN:]


def test_the_server_says_what_was_trained(tiny_checkpoint, adapter, lesson, prompt, tmp_path):
    path = tiny_checkpoint("qwen3_moe")
    options = (*kt_options(path), "--kt-expert-lora-path", str(adapter), *SERVED)
    with serving(path, tmp_path / "log", *options) as server:
        answers = answers_of(server, prompt)
        assert says_the_lesson(server, lesson)
        assert "decode steps are not replayed" not in server.log_text()
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    untrained = compare(base.eval(), *answers)
    trained = compare(PeftModel.from_pretrained(base, adapter).eval(), *answers)
    assert trained.decided > 80
    assert trained.holds_for_int8(), str(trained)  # the experts' activations are bfloat16
    assert not untrained.holds_for_int8(), str(untrained)


def test_experts_on_the_device_and_those_of_every_rank_have_it_too(
    tiny_checkpoint, adapter, lesson, prompt, tmp_path
):
    """What --kt-verify computes again is all experts of a token with the adapter, wherever they were."""
    path = tiny_checkpoint("qwen3_moe")
    ranks = ("--tp-size", "2", "--kt-verify", "10")
    options = (*kt_options(path, device_experts=5), "--kt-lora-path", str(adapter), *SERVED, *ranks)
    with serving(path, tmp_path / "log", *options) as server:
        answers = answers_of(server, prompt)
        assert says_the_lesson(server, lesson)
        verified = server.report()["verify"]
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    trained = compare(PeftModel.from_pretrained(base, adapter).eval(), *answers)
    assert trained.holds_for_int8(), str(trained)
    assert verified["checked"] > 0 and verified["wrong"] == verified["failed"] == 0


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.uint8])
def test_codes_are_not_taken_for_numbers(dtype):
    pair = torch.ones(1, 4), torch.ones(3, 1)
    adapter = Adapter(1.0, {}, {"layer.weight": pair})
    with pytest.raises(CheckpointError, match="where it is unquantised"):
        list(_added(iter([("layer.weight", torch.ones(3, 4).to(dtype))]), adapter))
    ((_, added),) = _added(iter([("layer.weight", torch.ones(3, 4))]), adapter)
    assert torch.equal(added, torch.full((3, 4), 2.0))
