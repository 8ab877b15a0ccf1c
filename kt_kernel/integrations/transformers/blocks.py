"""Where a transformers model keeps its routed experts, and whether they compute what ours do.

transformers 5 stores the experts of a layer in one module with the weights of all of them:

    gate_up_proj [E, 2I, H]    down_proj [E, H, I]    forward(hidden [T, H], ids [T, k], weights [T, k])

or both transposed, with or without biases.

Router, shared experts and scaling are other modules, so replacing this one serves every family alike. Flags
that transformers' own fast kernels go by say how the weights are laid out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from kt_kernel.checkpoint.families import GateUpRows
from kt_kernel.errors import ConfigurationError, FeatureUnavailableError
from kt_kernel.integrations.transformers.activations import gate_up_rows_of, swiglu_of
from kt_kernel.swiglu import Swiglu

_WEIGHTS = ("gate_up_proj", "down_proj")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")

# (flag of an experts module, the value we compute with, what another value means)
_FLAGS = (
    ("has_gate", True, "experts without a gate projection"),
    ("_is_expert_parallel", False, "experts spread over several processes"),
)


@dataclass(frozen=True)
class ExpertsBlock:
    """The experts of one layer: `path` of the module in the model, its sizes, activation and rows."""

    path: str
    layer_idx: int
    num_experts: int
    hidden_size: int
    intermediate_size: int
    swiglu: Swiglu
    rows: GateUpRows


class UnloadedExperts(nn.Module):
    """Stands where a layer's experts will be, without any weights."""

    def __init__(self, block: ExpertsBlock) -> None:
        super().__init__()
        self.block = block


def find_experts(model: nn.Module) -> list[ExpertsBlock]:
    """The experts of all layers in ascending order; their weights may be on the meta device.

    Raises ConfigurationError if there are none, FeatureUnavailableError if they compute something else than
    a SwiGLU, or differ in number.
    """
    blocks = [
        module.block if isinstance(module, UnloadedExperts) else _describe(path, module)
        for path, module in _experts_modules(model)
    ]
    if not blocks:
        raise ConfigurationError(
            f"the model ({type(model).__name__}) has no layer with routed experts in one module "
            f"({' and '.join(_WEIGHTS)}, as transformers 5 has them); give a mixture-of-experts model."
        )
    for block in blocks:
        if block.num_experts != blocks[0].num_experts:
            raise FeatureUnavailableError(
                f"'{block.path}' has {block.num_experts} experts and '{blocks[0].path}' has "
                f"{blocks[0].num_experts}, expected the same number in every layer; use another model."
            )
    return sorted(blocks, key=lambda block: block.layer_idx)


def replace_module(model: nn.Module, path: str, new: nn.Module) -> None:
    """Put `new` where the module at `path` is."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, new)


def _experts_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for path, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if isinstance(module, UnloadedExperts) or all(
            getattr(own.get(name), "ndim", 0) == 3 for name in _WEIGHTS
        ):
            yield path, module


def _describe(path: str, module: nn.Module) -> ExpertsBlock:
    for flag, expected, meaning in _FLAGS:
        if getattr(module, flag, expected) != expected:
            raise FeatureUnavailableError(
                f"'{path}' has {meaning}, which are not available; use another model."
            )
    found = _LAYER.search(path)
    if found is None:
        raise FeatureUnavailableError(
            f"'{path}' does not say which layer its experts belong to, expected '...layers.<number>...'; use "
            "another model."
        )
    swiglu = swiglu_of(module)
    rows = None if swiglu is None else gate_up_rows_of(module, swiglu)
    if swiglu is None or rows is None:
        raise FeatureUnavailableError(
            f"'{path}' ({type(module).__name__}) computes something else between its projections than "
            "silu(gate) * up or its clamped variants, which is not available; use another model."
        )
    gate_up, down = module.gate_up_proj.shape, module.down_proj.shape
    if getattr(module, "is_transposed", False):
        gate_up, down = (shape[:1] + shape[:0:-1] for shape in (gate_up, down))
    num_experts, hidden, intermediate = down
    if gate_up != (num_experts, 2 * intermediate, hidden):
        raise FeatureUnavailableError(
            f"'{path}' has gate_up_proj {list(module.gate_up_proj.shape)} and down_proj "
            f"{list(module.down_proj.shape)}, expected [E, 2I, H] and [E, H, I]; use another model."
        )
    return ExpertsBlock(path, int(found[1]), num_experts, hidden, intermediate, swiglu, rows)
