"""The demo model must be the dense model: weights, arithmetic, tokenizer and answers."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from kt_kernel.demo import load_dense_model
from kt_kernel.demo.checkpoint import checkpoint_bytes, layer_tensors
from kt_kernel.demo.experts import NUM_EXPERTS, split_mlp
from kt_kernel.demo.gguf_source import SourceModel, find_source, half_split_rows

TEXT = (
    "The history of science is the study of the development of science, including both the natural and "
    "social sciences. In 1687, Isaac Newton published the Principia, which laid out the laws of motion."
)


@pytest.fixture(scope="module")
def dense() -> LlamaForCausalLM:
    return load_dense_model(torch.float32)


@pytest.fixture(scope="module")
def mixture(demo_checkpoint):
    return AutoModelForCausalLM.from_pretrained(demo_checkpoint, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer(demo_checkpoint):
    return AutoTokenizer.from_pretrained(demo_checkpoint)


@pytest.fixture(scope="module")
def source() -> SourceModel:
    return SourceModel(find_source().path)


def test_expert_split_loses_no_bit(source):
    gate, up, down = (source.weight(f"blk.7.ffn_{part}.weight") for part in ("gate", "up", "down"))
    experts = split_mlp(gate, up, down)
    assert [expert.gate.shape for expert in experts] == [(192, 576)] * NUM_EXPERTS
    assert torch.equal(torch.cat([expert.gate for expert in experts]), gate)
    assert torch.equal(torch.cat([expert.up for expert in experts]), up)
    assert torch.equal(torch.cat([expert.down for expert in experts], dim=1) / NUM_EXPERTS, down)


def test_experts_sum_to_the_dense_mlp_exactly_on_integers():
    # relu instead of silu and integers throughout: every sum is exact, so the split must match to the bit
    generator = torch.Generator().manual_seed(1)
    gate, up = (torch.randint(-3, 4, (64, 16), generator=generator).double() for _ in range(2))
    down = torch.randint(-3, 4, (16, 64), generator=generator).double()
    x = torch.randint(-3, 4, (16,), generator=generator).double()

    def mlp(gate, up, down):
        return down @ (torch.relu(gate @ x) * (up @ x))

    routed = sum(mlp(e.gate, e.up, e.down) / NUM_EXPERTS for e in split_mlp(gate, up, down))
    assert torch.equal(routed, mlp(gate, up, down))


def test_mlp_that_cannot_be_cut_is_refused():
    with pytest.raises(ValueError, match="20 is not a multiple of 8"):
        split_mlp(torch.zeros(20, 4), torch.zeros(20, 4), torch.zeros(4, 20))


def test_rope_rows_of_two_heads_are_unmixed():
    # one column whose values name head and row: GGUF keeps rows j and j + d/2 of a head side by side
    interleaved = torch.tensor([[0], [2], [1], [3], [10], [12], [11], [13]])
    assert half_split_rows(interleaved, 2).flatten().tolist() == [0, 1, 2, 3, 10, 11, 12, 13]


def test_weights_agree_with_transformers_own_gguf_reader(dense):
    read = load_gguf_checkpoint(str(find_source().path), return_tensors=True, model_to_load=dense)
    ours = dense.state_dict()
    assert set(read["tensors"]) == set(ours) - {"lm_head.weight"}
    for name, tensor in read["tensors"].items():
        assert torch.equal(tensor.to(torch.bfloat16), ours[name].to(torch.bfloat16)), name


def test_logits_equal_the_dense_model(dense, mixture, tokenizer):
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    with torch.no_grad():
        difference = (dense(ids).logits - mixture(ids).logits).abs().max()
    assert difference < 2e-3  # logits reach 37; float32 sums in another order differ by 1e-4


def test_a_wrong_expert_would_be_seen_in_the_logits(dense, demo_checkpoint, tokenizer):
    damaged = AutoModelForCausalLM.from_pretrained(demo_checkpoint, dtype=torch.float32).eval()
    with torch.no_grad():
        damaged.model.layers[15].mlp.experts.down_proj[3] = 0
        ids = tokenizer(TEXT, return_tensors="pt").input_ids
        difference = (dense(ids).logits - damaged(ids).logits).abs().max()
    assert difference > 0.1


def test_both_models_know_the_capital_of_france(dense, mixture, tokenizer):
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answers = []
    for model in (dense, mixture):
        output = model.generate(**prompt, max_new_tokens=20, do_sample=False)
        answers.append(tokenizer.decode(output[0, prompt["input_ids"].shape[1] :]))
    assert answers[0] == answers[1]
    assert "Paris" in answers[0] and answers[0].endswith("<|im_end|>")


def test_server_does_not_sample_the_small_model_at_full_temperature(demo_checkpoint):
    generation = GenerationConfig.from_pretrained(demo_checkpoint)
    assert (generation.do_sample, generation.temperature) == (True, 0.01)
    assert generation.eos_token_id == 2


@pytest.mark.parametrize("text", [TEXT, "naïve 東京 🙂\n\n\tdef f(x):\n    return x  # 1234"])
def test_text_survives_the_tokenizer(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_every_digit_is_a_token_of_its_own(tokenizer):
    assert [tokenizer.decode([i]) for i in tokenizer("in 2026").input_ids] == ["in", " ", "2", "0", "2", "6"]


def test_control_tokens_are_single_ids_and_end_the_answer(tokenizer):
    assert tokenizer("<|im_start|>user").input_ids[0] == tokenizer.bos_token_id == 1
    assert tokenizer("<|im_end|>").input_ids == [tokenizer.eos_token_id] == [2]
    assert tokenizer.decode([1, 2], skip_special_tokens=True) == ""


def test_index_names_every_tensor_in_its_file(demo_checkpoint, source):
    index = json.loads((demo_checkpoint / "model.safetensors.index.json").read_text())
    found = {}
    for file in demo_checkpoint.glob("*.safetensors"):
        with safe_open(file, "pt") as shard:
            found |= dict.fromkeys(shard.keys(), file.name)
    assert index["weight_map"] == found
    assert index["metadata"]["total_size"] == checkpoint_bytes(source.dimensions)
    assert {name for name, _ in layer_tensors(source, 29)} < found.keys()
