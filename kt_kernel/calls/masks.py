"""Which experts live on the accelerator: bool masks, True = on the accelerator, so the CPU skips it."""

from __future__ import annotations

import torch

from kt_kernel.errors import ConfigurationError


def generate_gpu_experts_masks(activation_freq: torch.Tensor, num_gpu_experts: int) -> torch.Tensor:
    """Put the most used experts of the whole model on the accelerator.

    `activation_freq` [layers, experts]: how often each expert was chosen. `num_gpu_experts`: total over all
    layers, clamped to [0, layers * experts]. Returns a bool tensor [layers, experts] on the CPU; among equal
    frequencies the lower layer, then the lower expert, goes first.
    """
    if activation_freq.dim() != 2:
        raise ConfigurationError(
            f"activation_freq has shape {list(activation_freq.shape)}, expected [layers, experts]."
        )
    frequencies = activation_freq.detach().to("cpu").reshape(-1)
    if frequencies.is_floating_point() and bool(frequencies.isnan().any()):
        raise ConfigurationError(
            "activation_freq holds NaN, expected counts or frequencies; collect the statistics again."
        )
    count = min(max(int(num_gpu_experts), 0), frequencies.numel())
    chosen = torch.argsort(frequencies, descending=True, stable=True)[:count]
    mask = torch.zeros(frequencies.numel(), dtype=torch.bool)
    mask[chosen] = True
    return mask.view(activation_freq.shape)


def resolve_gpu_experts_mask(
    num_experts: int, gpu_experts_mask: torch.Tensor | None, num_gpu_experts: int | None
) -> torch.Tensor:
    """One private mask (bool [num_experts], CPU) from the two ways to say where experts live.

    A mask names the experts one by one; a number n means experts 0 to n-1. Neither = all on the CPU. Both
    must agree.
    """
    if num_gpu_experts is not None and not 0 <= num_gpu_experts <= num_experts:
        raise ConfigurationError(
            f"num_gpu_experts is {num_gpu_experts}, but it must be between 0 and num_experts ({num_experts})."
        )
    if gpu_experts_mask is None:
        mask = torch.zeros(num_experts, dtype=torch.bool)
        mask[: num_gpu_experts or 0] = True
        return mask
    if not isinstance(gpu_experts_mask, torch.Tensor):
        raise ConfigurationError(
            f"gpu_experts_mask is a {type(gpu_experts_mask).__name__}, expected a bool tensor of "
            f"{num_experts} entries or None."
        )
    if gpu_experts_mask.dtype != torch.bool or gpu_experts_mask.shape != (num_experts,):
        raise ConfigurationError(
            f"gpu_experts_mask is {gpu_experts_mask.dtype} {list(gpu_experts_mask.shape)}, "
            f"expected torch.bool [{num_experts}] (one entry per expert)."
        )
    mask = gpu_experts_mask.detach().to("cpu", copy=True).contiguous()
    on_device = int(mask.sum())
    if num_gpu_experts is not None and num_gpu_experts != on_device:
        raise ConfigurationError(
            f"num_gpu_experts is {num_gpu_experts}, but gpu_experts_mask puts {on_device} experts on the "
            "accelerator; give one of the two."
        )
    return mask
