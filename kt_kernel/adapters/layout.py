"""How the LoRA of a layer's experts is written in adapter files, and read from all of their layouts.

In memory the three projections of all experts are stacked: A [E, r, in], B [E, out, r]. Under the path of the
experts module, files hold

    per expert    {e}.gate_proj.lora_A.weight [r, in]   {e}.gate_proj.lora_B.weight [out, r]
    PEFT, fused   base_layer.lora_A.weight [E R, H]     base_layer.lora_B.weight [2 I, R E]    gate over up
                  lora_A.weight            [E r, I]     lora_B.weight            [H, r E]      down

The first is what we write, and what PEFT, vLLM and SGLang write for experts that are modules of their own;
Mixtral and its kin call the projections w1, w3, w2. The second is PEFT's for one tensor of all experts, and
what PEFT makes of the first when it loads it: columns of B run over the experts first. R is r where gate and
up share A, or 2 r, where B is block-diagonal.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from kt_kernel.errors import CheckpointError

PROJECTIONS = ("gate", "up", "down")


@dataclass(frozen=True)
class ProjectionNames:
    """What a family calls the three matrices of an expert."""

    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"

    @property
    def all(self) -> tuple[str, str, str]:
        return (self.gate, self.up, self.down)


NAMINGS = (ProjectionNames(), ProjectionNames("w1", "w3", "w2"))

Stacked = dict[tuple[str, str], torch.Tensor]
"""(projection, "A" or "B") -> [E, r, in] or [E, out, r]."""

_PER_EXPERT = re.compile(r"(\d+)\.(\w+)\.lora_([AB])\.weight")
_FUSED = re.compile(r"(base_layer\.)?lora_([AB])\.weight")
_PROJECTION_OF = {
    name: projection for names in NAMINGS for name, projection in zip(names.all, PROJECTIONS, strict=True)
}


def lora_scale(rank: int, alpha: float, *, use_rslora: bool) -> float:
    """What B A is multiplied by, as PEFT defines it."""
    return alpha / (math.sqrt(rank) if use_rslora else rank)


def per_expert(stacked: Stacked, names: ProjectionNames) -> dict[str, torch.Tensor]:
    """Names under the experts module -> views."""
    said = dict(zip(PROJECTIONS, names.all, strict=True))
    return {
        f"{expert}.{said[projection]}.lora_{which}.weight": matrix
        for (projection, which), matrices in stacked.items()
        for expert, matrix in enumerate(matrices)
    }


def stack(tensors: Mapping[str, torch.Tensor], num_experts: int, rank: int, where: str) -> Stacked:
    """The stacked matrices from the tensors under one experts module, in either layout.

    `where`: what messages call the module. Raises CheckpointError if one of them is missing or does not fit.
    """
    fused = {(m[1], m[2]): t for name, t in tensors.items() if (m := _FUSED.fullmatch(name))}
    stacked = _unfuse(fused, num_experts, rank, where) if fused else _collect(tensors, num_experts, where)
    for (projection, which), tensor in stacked.items():
        found = tensor.shape[1 if which == "A" else 2]
        if found != rank:
            raise CheckpointError(
                f"{where}: lora_{which} of {projection} has rank {found}, expected {rank}; load it with its "
                "own configuration."
            )
    return stacked


def is_fused(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Do the tensors under an experts module have one LoRA for gate and up, gate's rows first?"""
    return any(_FUSED.fullmatch(name) for name in tensors)


def refuse_fused(tensors: Mapping[str, torch.Tensor], where: str) -> None:
    """Raises CheckpointError for them where the model has the rows of gate and up in turn."""
    if is_fused(tensors):
        raise CheckpointError(
            f"{where}: the adapter has one LoRA for gate and up together, and this family has their rows in "
            "turn; give an adapter with a LoRA for each."
        )


def is_expert_tensor(name: str) -> bool:
    """Is that, under an experts module, a name of one of the layouts?"""
    return bool(_PER_EXPERT.fullmatch(name) or _FUSED.fullmatch(name))


def _collect(tensors: Mapping[str, torch.Tensor], num_experts: int, where: str) -> Stacked:
    found: dict[tuple[str, str], dict[int, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        match = _PER_EXPERT.fullmatch(name)
        if match is None or match[2] not in _PROJECTION_OF:
            raise CheckpointError(
                f"{where}: tensor '{name}' is not of an expert's gate, up or down projection; load another "
                "adapter."
            )
        found.setdefault((_PROJECTION_OF[match[2]], match[3]), {})[int(match[1])] = tensor
    for projection in PROJECTIONS:
        for which in "AB":
            missing = set(range(num_experts)) - found.get((projection, which), {}).keys()
            if missing:
                raise CheckpointError(
                    f"{where}: lora_{which} of the {projection} projection of expert {min(missing)} is not "
                    f"there ({len(missing)} of {num_experts} are missing); give an adapter of all experts."
                )
    return {
        key: torch.stack([matrices[expert] for expert in range(num_experts)])
        for key, matrices in found.items()
    }


def _unfuse(
    fused: Mapping[tuple[Any, Any], torch.Tensor], num_experts: int, rank: int, where: str
) -> Stacked:
    missing = [key for key in ((p, w) for p in ("base_layer.", None) for w in "AB") if key not in fused]
    if missing:
        raise CheckpointError(
            f"{where}: '{missing[0][0] or ''}lora_{missing[0][1]}.weight' is not there, expected LoRA on "
            "gate, up and down; give an adapter of all three."
        )
    gate_up_a, gate_up_b = _experts_of(fused["base_layer.", "A"], fused["base_layer.", "B"], num_experts)
    down_a, down_b = _experts_of(fused[None, "A"], fused[None, "B"], num_experts)
    gate_b, up_b = gate_up_b.chunk(2, dim=1)
    gate_a = up_a = gate_up_a
    if gate_up_a.shape[1] == 2 * rank:  # block-diagonal, as PEFT makes it of one LoRA for each
        if bool(gate_b[:, :, rank:].any()) or bool(up_b[:, :, :rank].any()):
            raise CheckpointError(
                f"{where}: the LoRA of gate and up together has rank {2 * rank} and is not one of rank "
                f"{rank} for each; train gate and up apart, or with the same rank as down."
            )
        (gate_a, up_a), gate_b, up_b = gate_up_a.chunk(2, dim=1), gate_b[:, :, :rank], up_b[:, :, rank:]
    return {
        ("gate", "A"): gate_a.contiguous(),
        ("gate", "B"): gate_b.contiguous(),
        ("up", "A"): up_a.contiguous(),
        ("up", "B"): up_b.contiguous(),
        ("down", "A"): down_a,
        ("down", "B"): down_b,
    }


def _experts_of(a: torch.Tensor, b: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[E R, in] and [out, R E] of PEFT -> [E, R, in] and [E, out, R]."""
    rank = a.shape[0] // num_experts
    return a.view(num_experts, rank, -1), b.view(-1, rank, num_experts).permute(2, 0, 1).contiguous()
