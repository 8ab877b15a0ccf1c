"""`average_gradients`: several processes train the same experts, beside DDP or FSDP2 of all other layers.

Those want every parameter on the device that the model computes on, or cut in pieces; parameters of experts
are whole and on the CPU. So their gradients are averaged here, by gloo, as soon as a backward pass has them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import distributed, nn

from kt_kernel.errors import CallOrderError
from kt_kernel.training.full import FullExperts
from kt_kernel.training.lora import ExpertMatrices

_IGNORED = "_ddp_params_and_buffers_to_ignore"  # where DDP looks, in the module that it is given


def average_gradients(model: nn.Module) -> set[nn.Parameter]:
    """Average the gradients of the experts' parameters over all processes; returns these parameters.

    First all processes take those of the first one: seeds may have drawn them differently, and FSDP2, like
    DDP with ignored parameters, does not look.

    Call it once in each process, before DDP, accelerate or FSDP2 wraps `model`: DDP then leaves them alone,
    and so does FSDP2 if given them as `ignored_params`. Gradients that add up are averaged after each
    backward pass, which is the same in the end. Raises CallOrderError before the process group is there.
    """
    if not distributed.is_initialized():
        raise CallOrderError(
            "the process group is not there yet; call init_process_group, or accelerate, first."
        )
    found = dict(_trained(model))
    group = distributed.new_group(backend="gloo")
    processes = distributed.get_world_size(group)

    def average(parameter: torch.Tensor) -> None:
        distributed.all_reduce(parameter.grad, group=group)
        parameter.grad /= processes

    for parameter in found.values():
        of_first = parameter.detach().clone()
        distributed.broadcast(of_first, 0, group=group)
        with torch.no_grad():
            parameter.copy_(of_first)
        parameter.register_post_accumulate_grad_hook(average)
    setattr(model, _IGNORED, [*getattr(model, _IGNORED, ()), *found])
    return set(found.values())


def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for path, module in model.named_modules():
        if isinstance(module, (ExpertMatrices, FullExperts)):
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.requires_grad:
                    yield f"{path}.{name}", parameter
