"""FullExperts: experts whose own weights are trained, not a LoRA on them.

The parameters are the user's masters, as transformers has them; what the kernels multiply with is a packed
copy in bfloat16, made anew before the next call whenever they have changed:

    gate_up_proj, down_proj  --(they, or an optimiser, moved)-->  packed bf16  -->  forward, backward
            ^                                                                            |
            +---- any optimiser ----  .grad in the parameters' dtype  <--- fp32 sums ----+

Version counters alone do not do: torch's fused optimisers, which Trainer takes by default, leave them alone
(torch 2.13). So every step of an optimiser that has the parameters counts as a change, too.
"""

from __future__ import annotations

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


_STEPS = "kt_steps"  # an attribute of our parameters: steps of optimisers that have them


def _count_steps(optimizer: torch.optim.Optimizer, *arguments: Any) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if (steps := getattr(parameter, _STEPS, None)) is not None:
                setattr(parameter, _STEPS, steps + 1)


register_optimizer_step_post_hook(_count_steps)


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
        self._packed, self._generation = self._state(), 0
        self.register_load_state_dict_pre_hook(_from_files)

    def matrices(self) -> Matrices:
        """The parameters, after the layer is packed anew if they have changed."""
        if self._packed != (state := self._state()):
            self._generation += 1
            gate_up, down = (t.detach().to(torch.bfloat16) for t in (self.gate_up_proj, self.down_proj))
            pack_anew(self._wrapper, gate_up.contiguous(), down.contiguous())
            self._packed = state
        return Matrices(self.gate_up_proj, self.down_proj, lambda: self._generation)

    def _state(self) -> tuple[int, ...]:
        """Changes when a parameter is changed in place, or gets other memory, or an optimiser steps."""
        state: list[int] = []
        for parameter in (self.gate_up_proj, self.down_proj):
            if not hasattr(parameter, _STEPS):
                setattr(parameter, _STEPS, 0)
            state += (getattr(parameter, _STEPS), parameter._version, parameter.data_ptr())
        return tuple(state)

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
def _from_files(
    module: FullExperts,
    state: dict,
    prefix: str,
    metadata: dict,
    strict: bool,  # noqa: FBT001
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    """Before load_state_dict: what files hold one by one goes into the parameters; the rest is missing."""
    gate, up = module.gate_up_proj.chunk(2, dim=1)
    places = dict(zip(module.names.all, (gate, up, module.down_proj), strict=True))
    absent = {f"{prefix}{e}.{name}.weight" for e in range(len(gate)) for name in places}
    given = absent & state.keys()
    if not given:
        return
    for key in given:
        expert, name, _ = key.removeprefix(prefix).split(".")
        place = places[name][int(expert)]
        if state[key].shape != place.shape:
            errors.append(f"'{key}' has shape {list(state[key].shape)}, expected {list(place.shape)}.")
        else:
            place.copy_(state.pop(key))
    missing.extend(sorted(absent - given))
    state[prefix + "gate_up_proj"], state[prefix + "down_proj"] = module.gate_up_proj, module.down_proj
