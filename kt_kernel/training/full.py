"""FullExperts: experts whose own weights are trained, not a LoRA on them.

The parameters are the user's masters, as transformers has them; what the kernels multiply with is a packed
copy in bfloat16, made anew before the next call whenever they have changed:

    gate_up_proj, down_proj  --(they, or an optimiser, moved)-->  packed bf16  -->  forward, backward
            ^                                                                            |
            +---- any optimiser ----  .grad in the parameters' dtype  <--- fp32 sums ----+

Version counters alone do not do: torch's fused optimisers, which Trainer takes by default, leave them alone
(torch 2.13). So every step of any optimiser of this process counts as a change, too.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import PreTrainedModel

from kt_kernel.adapters.backend import ExpertWeights
from kt_kernel.adapters.layout import ProjectionNames
from kt_kernel.checkpoint.families import GateUpRows
from kt_kernel.errors import ConfigurationError, FeatureUnavailableError
from kt_kernel.integrations.transformers.blocks import ExpertsBlock
from kt_kernel.moe import KTMoEWrapper
from kt_kernel.training.chosen import choose_backend
from kt_kernel.training.experts import TrainableExperts
from kt_kernel.training.function import Matrices
from kt_kernel.training.weights import PackedWeights, pack_anew

LORA, FULL = "lora", "full"  # what is trained of the experts

_MASTERS = "BF16"  # the one method into which changed weights are packed without rounding to a grid
_OF_ONE_EXPERT = re.compile(r"(\d+)\.(\w+)\.weight")


class _Steps:
    """How many steps the optimisers of this process have made."""

    def __init__(self) -> None:
        self.made = 0
        register_optimizer_step_post_hook(self._count)

    def _count(self, *arguments: Any) -> None:
        self.made += 1


_STEPS = _Steps()


class Masters:
    """A `WeightSource` over the parameters of a module, as they are when an expert is asked for."""

    def __init__(self, module: FullExperts, packed: PackedWeights) -> None:
        self._module = module
        self.num_experts = packed.num_experts
        self.hidden_size = packed.hidden_size
        self.intermediate_size = packed.intermediate_size

    def expert(self, expert: int) -> ExpertWeights:
        gate, up = self._module.gate_up_proj.detach()[expert].chunk(2)
        return ExpertWeights(gate, up, self._module.down_proj.detach()[expert])


class FullExperts(TrainableExperts):
    """A `TrainableExperts` with the parameters `gate_up_proj` [E, 2I, H] and `down_proj` [E, H, I].

    They stay on the CPU in the dtype that they were made in, wherever the model moves.
    """

    def __init__(
        self,
        wrapper: KTMoEWrapper,
        backend: str,
        block: ExpertsBlock,
        names: ProjectionNames,
        dtype: torch.dtype,
    ) -> None:
        """`wrapper`: the loaded layer, of method BF16. `backend`: a name of choose_backend."""
        _check(block, wrapper)
        packed = PackedWeights(wrapper)
        masters = Masters(self, packed)
        super().__init__(choose_backend(backend, wrapper, masters, block.swiglu), masters, names)
        self._wrapper = wrapper
        e, h, i = packed.num_experts, packed.hidden_size, packed.intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(e, 2 * i, h, dtype=dtype, device="cpu"))
        self.down_proj = nn.Parameter(torch.empty(e, h, i, dtype=dtype, device="cpu"))
        _unpack(packed, self.gate_up_proj, self.down_proj)
        self._packed = self._state()
        self.register_load_state_dict_pre_hook(_from_files)

    def matrices(self) -> Matrices:
        """The parameters, after the layer is packed anew if they have changed."""
        if self._packed != (state := self._state()):
            gate_up, down = (t.detach().to(torch.bfloat16) for t in (self.gate_up_proj, self.down_proj))
            pack_anew(self._wrapper, gate_up.contiguous(), down.contiguous())
            self._packed = state
        return self.gate_up_proj, self.down_proj

    def _state(self) -> tuple[int, ...]:
        """Changes when a parameter is changed in place, or gets other memory, or an optimiser steps."""
        both = (self.gate_up_proj, self.down_proj)
        return (_STEPS.made, *(number for t in both for number in (t._version, t.data_ptr())))

    def _apply(self, fn: Callable, recurse: bool = True) -> FullExperts:  # noqa: FBT001, FBT002
        """Nothing: see the class."""
        return self


def check_trained(trained: str, method: str, path: str) -> None:
    """Raises ConfigurationError unless `trained` is LORA, or FULL of experts of method BF16."""
    if trained not in (LORA, FULL):
        raise ConfigurationError(f"train_experts is {trained!r}, expected {LORA!r} or {FULL!r}.")
    if trained == FULL and method != _MASTERS:
        raise ConfigurationError(
            f"train_experts is {FULL!r}, but the experts of '{path}' are in memory as {method}, whose "
            "weights are rounded to a grid and cannot take small steps; give experts='bf16', or train a LoRA."
        )


def saves_as_transformers(model: PreTrainedModel) -> PreTrainedModel:
    """`model`, whose save_pretrained names the tensors of experts as the family's files do."""
    # Of the renamings transformers keeps those that it met while loading, where it met no experts.
    del model._weight_conversions
    return model


def _check(block: ExpertsBlock, wrapper: KTMoEWrapper) -> None:
    if any(bias is not None for bias in wrapper.biases(0)):
        raise FeatureUnavailableError(
            f"'{block.path}' has experts with biases, and such experts are not trained whole; train a LoRA."
        )
    if block.rows is not GateUpRows.GATE_FIRST:
        raise FeatureUnavailableError(
            f"'{block.path}' has rows of gate and up in turn, and such experts are not trained whole; "
            "train a LoRA."
        )


@torch.no_grad()
def _unpack(packed: PackedWeights, gate_up: torch.Tensor, down: torch.Tensor) -> None:
    for expert in range(packed.num_experts):
        weights = packed.expert(expert)
        gate_up[expert].copy_(torch.cat((weights.gate, weights.up)))
        down[expert].copy_(weights.down)


@torch.no_grad()
def _from_files(module: FullExperts, state: dict, prefix: str, *rest: Any) -> None:
    """Before load_state_dict: what files hold one by one, perhaps some of it, goes into the parameters."""
    gate, up = module.gate_up_proj.chunk(2, dim=1)
    places = dict(zip(module.names.all, (gate, up, module.down_proj), strict=True))
    filled = False
    for key in [key for key in state if key.startswith(prefix)]:
        match = _OF_ONE_EXPERT.fullmatch(key.removeprefix(prefix))
        if match is not None and match[2] in places:
            places[match[2]][int(match[1])].copy_(state.pop(key))
            filled = True
    if filled:  # else they would be reported as missing
        state[prefix + "gate_up_proj"], state[prefix + "down_proj"] = module.gate_up_proj, module.down_proj
