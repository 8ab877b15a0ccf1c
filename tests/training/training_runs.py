"""Short runs of training, and the model and data that they have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

import kt_kernel.training as training

ATTENTION = ["q_proj", "v_proj", "q_a_proj", "kv_b_proj"]


def lora(rank: int = 4, **options: object) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=ATTENTION, task_type="CAUSAL_LM", **options)


def trainable(
    path: Path, config: LoraConfig | None = None, dtype: torch.dtype = torch.float32, **options: object
) -> nn.Module:
    """A model of ours with LoRA on attention and experts, ready to be trained."""
    torch.manual_seed(0)
    model = training.load(AutoModelForCausalLM, path, dtype=dtype, **{"threads": 2, **options})
    return get_peft_model(model, training.lora_config(config or lora(), experts=True)).train()


def batches(
    count: int, rows: int = 2, length: int = 12, vocabulary: int = 256, seed: int = 1
) -> list[torch.Tensor]:
    """Texts with something to learn: each token mostly follows from the one before."""
    generator = torch.Generator().manual_seed(seed)
    follows = torch.randperm(vocabulary, generator=generator)
    out = []
    for _ in range(count):
        ids = torch.empty(rows, length, dtype=torch.int64)
        ids[:, 0] = torch.randint(vocabulary, (rows,), generator=generator)
        for place in range(1, length):
            ids[:, place] = follows[ids[:, place - 1]]
        out.append(ids)
    return out


def parameters(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def adamw(model: nn.Module, lr: float = 1e-2) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters(model), lr=lr)


def train(
    model: nn.Module,
    data: Iterable[torch.Tensor],
    optimizer: torch.optim.Optimizer | None = None,
    accumulate: int = 1,
    loss_of: Callable[[nn.Module, torch.Tensor], torch.Tensor] | None = None,
) -> list[float]:
    """The losses of the steps, each over one batch, cut into `accumulate` parts."""
    optimizer = optimizer or adamw(model)
    loss_of = loss_of or (lambda model, ids: model(input_ids=ids, labels=ids).loss)
    losses = []
    for ids in data:
        total = 0.0
        for part in ids.chunk(accumulate):
            loss = loss_of(model, part) / accumulate
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(total)
    return losses
