"""Tokens per second of training steps: our experts, and stock transformers with PEFT, on the same CPU.

A Qwen3-MoE model of layers of shape S (bench/shapes), random bf16 weights, LoRA on q, v and every expert,
AdamW, one text of random tokens a step. The two models take turns within one run; figures are medians of the
rounds, "ratio" is ours / theirs. Stock transformers has its LoRA either

    fused     on its fused experts, by PEFT's target_parameters (LoRA of the whole stack is added to it)
    linear    on experts that are modules of three linear layers each, in a loop, as before transformers 5

    python bench/training_transformers.py                       # bf16, 1 layer, 1024 tokens, linear
    python bench/training_transformers.py --experts int8 --theirs fused --tokens 256
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.functional import silu
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

import kt_kernel.training as training
from kt_kernel.bench.shapes import SHAPES

_SHAPE = SHAPES["S"]
_VOCABULARY = 1024
_SETTLE_SECONDS = 0.02


def config(layers: int) -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        vocab_size=_VOCABULARY,
        hidden_size=_SHAPE.hidden,
        moe_intermediate_size=_SHAPE.intermediate,
        num_experts=_SHAPE.experts,
        num_experts_per_tok=_SHAPE.top_k,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
    )


class LinearExpert(nn.Module):
    def __init__(self, gate_up: torch.Tensor, down: torch.Tensor) -> None:
        super().__init__()
        gate, up = gate_up.chunk(2)
        self.gate_proj, self.up_proj, self.down_proj = map(linear_of, (gate, up, down))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))


def linear_of(weight: torch.Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype, device="meta")
    layer.weight = nn.Parameter(weight.clone())
    return layer


class LinearExperts(nn.ModuleList):
    """The experts of a layer as modules, called as transformers calls its fused ones."""

    def forward(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(hidden)
        for expert in ids.unique().tolist():
            token, place = (ids == expert).nonzero(as_tuple=True)
            part = self[expert](hidden[token]) * weights[token, place, None].to(hidden.dtype)
            out.index_add_(0, token, part)
        return out


def with_linear_experts(model: PreTrainedModel) -> PreTrainedModel:
    for layer in model.model.layers:
        fused = layer.mlp.experts
        pairs = zip(fused.gate_up_proj.data, fused.down_proj.data, strict=True)
        layer.mlp.experts = LinearExperts(LinearExpert(*pair) for pair in pairs)
    return model


def attention_lora(rank: int, **options: object) -> LoraConfig:
    targets = ["q_proj", "v_proj", *options.pop("more", ())]
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM", **options)


def ours(path: str, experts: str, rank: int, threads: int) -> nn.Module:
    model = training.load(AutoModelForCausalLM, path, experts=experts, dtype=torch.bfloat16, threads=threads)
    return get_peft_model(model, training.lora_config(attention_lora(rank), experts=True))


def theirs(path: str, kind: str, rank: int) -> nn.Module:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    if kind == "linear":
        lora = attention_lora(rank, more=("gate_proj", "up_proj", "down_proj"))
        return get_peft_model(with_linear_experts(model), lora)
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    return get_peft_model(model, attention_lora(rank, target_parameters=parameters))


def step_of(model: nn.Module, tokens: int) -> Callable[[int], float]:
    """A training step on the text of a number; it returns seconds."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    model.train()

    def step(seed: int) -> float:
        ids = torch.randint(_VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(seed))
        time.sleep(_SETTLE_SECONDS)
        begin = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - begin

    return step


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experts", default="bf16", choices=("bf16", "int8", "int4"))
    parser.add_argument("--theirs", default="linear", choices=("linear", "fused"))
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        torch.set_default_dtype(torch.bfloat16)
        Qwen3MoeForCausalLM(config(options.layers)).save_pretrained(folder)
        torch.set_default_dtype(torch.float32)
        models = {
            "ours": ours(folder, options.experts, options.rank, options.threads),
            "theirs": theirs(folder, options.theirs, options.rank),
        }
        steps = {name: step_of(model, options.tokens) for name, model in models.items()}
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for round_ in range(-1, options.rounds):
            for name, step in steps.items():
                took = step(round_ + 1)
                if round_ >= 0:
                    seconds[name].append(took)
    rate = {name: options.tokens / statistics.median(each) for name, each in seconds.items()}
    print(
        f"{options.experts} {options.layers} layers {options.tokens} tokens {options.threads} threads: "
        f"ours {rate['ours']:.0f} tokens/s, transformers + PEFT ({options.theirs}) {rate['theirs']:.0f}, "
        f"ratio {rate['ours'] / rate['theirs']:.2f}"
    )


if __name__ == "__main__":
    main()
