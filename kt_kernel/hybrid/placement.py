"""Where experts live at start: bool masks [layers, experts], True = on the device, False = on the CPU.

    uniform        every MoE layer gets the same number (the first layers one more when it does not divide)
    front-loading  the first MoE layers are filled before the next gets any
    random         any (layer, expert) pair may be chosen; the same pairs every time
    frequency      the most used (layer, expert) pairs of the whole model, from counts of an earlier run

`uniform` and `front-loading` always choose the experts with the lowest numbers of a layer. The choice
depends on nothing but the arguments, so every rank of a server finds the same one without asking the
others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from kt_kernel.calls.masks import generate_gpu_experts_masks
from kt_kernel.errors import ConfigurationError

RANDOM_SEED = 42
FREQUENCY = "frequency"


def _uniform(moe_layers: int, num_experts: int, total: int) -> torch.Tensor:
    share, rest = divmod(total, moe_layers)
    counts = torch.full((moe_layers, 1), share)
    counts[:rest] += 1
    return torch.arange(num_experts) < counts


def _front_loading(moe_layers: int, num_experts: int, total: int) -> torch.Tensor:
    return (torch.arange(moe_layers * num_experts) < total).view(moe_layers, num_experts)


def _random(moe_layers: int, num_experts: int, total: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(RANDOM_SEED)
    mask = torch.zeros(moe_layers * num_experts, dtype=torch.bool)
    mask[torch.randperm(mask.numel(), generator=generator)[:total]] = True
    return mask.view(moe_layers, num_experts)


_WITHOUT_COUNTS: dict[str, Callable[[int, int, int], torch.Tensor]] = {
    "uniform": _uniform,
    "front-loading": _front_loading,
    "random": _random,
}
STRATEGIES = (*_WITHOUT_COUNTS, FREQUENCY)


def device_expert_masks(
    strategy: str,
    num_layers: int,
    moe_layers: Sequence[int],
    num_experts: int,
    total: int,
    counts: torch.Tensor | None = None,
) -> torch.Tensor:
    """Choose `total` experts of the whole model; returns a bool tensor [num_layers, num_experts] on the CPU.

    `moe_layers` lists the layers that have experts, ascending; rows of other layers stay False. `counts`
    [num_layers, num_experts]: how often each expert was used, for `frequency` only. Raises
    ConfigurationError for an unknown strategy, a total that the model's experts cannot give, or counts that
    are missing.
    """
    if strategy not in STRATEGIES:
        raise ConfigurationError(
            f"placement strategy {strategy!r} is unknown; use one of {', '.join(STRATEGIES)}."
        )
    capacity = len(moe_layers) * num_experts
    if not 0 <= total <= capacity:
        raise ConfigurationError(
            f"{total} experts were asked for on the device, but the model has {capacity} "
            f"({len(moe_layers)} layers of {num_experts}); use a number from 0 to that."
        )
    masks = torch.zeros(num_layers, num_experts, dtype=torch.bool)
    if not moe_layers:
        return masks
    rows = list(moe_layers)
    if strategy == FREQUENCY:
        masks[rows] = generate_gpu_experts_masks(_counts(counts, masks.shape)[rows], total)
    else:
        masks[rows] = _WITHOUT_COUNTS[strategy](len(rows), num_experts, total)
    return masks


def _counts(counts: torch.Tensor | None, shape: torch.Size) -> torch.Tensor:
    if counts is None:
        raise ConfigurationError(
            "placement strategy 'frequency' needs counts of an earlier run; record them, and name the file "
            "(--init-expert-location)."
        )
    if counts.shape != shape:
        raise ConfigurationError(
            f"the counts have shape {list(counts.shape)}, but the model has {list(shape)} "
            "(layers, experts); record them with this model."
        )
    return counts
