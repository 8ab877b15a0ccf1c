"""Which checkpoint expert goes into which slot of a layer, and checks of expert tensors given directly."""

from __future__ import annotations

import torch

from kt_kernel.errors import ConfigurationError, InputError
from kt_kernel.formats.record import MethodRecord
from kt_kernel.layer_config import LayerConfig


def logical_order(physical_to_logical: torch.Tensor | None, num_experts: int) -> list[int]:
    """Entry p = logical (checkpoint) id of the expert in physical slot p; None = the same order.

    Raises ConfigurationError unless the map is a CPU tensor of integers holding each id exactly once.
    """
    if physical_to_logical is None:
        return list(range(num_experts))
    if (
        physical_to_logical.shape != (num_experts,)
        or not physical_to_logical.is_cpu
        or physical_to_logical.dtype.is_floating_point
        or physical_to_logical.dtype is torch.bool
    ):
        raise ConfigurationError(
            f"physical_to_logical_map is {physical_to_logical.dtype} {list(physical_to_logical.shape)} on "
            f"{physical_to_logical.device}, expected integers [{num_experts}] on cpu."
        )
    order = physical_to_logical.tolist()
    if sorted(order) != list(range(num_experts)):
        absent = sorted(set(range(num_experts)) - set(order))
        outside = sorted(set(order) - set(range(num_experts)))
        raise ConfigurationError(
            f"physical_to_logical_map leaves out experts {absent[:8]} and names impossible ones "
            f"{outside[:8]}, expected each of 0 to {num_experts - 1} once."
        )
    return order


def check_expert_tensors(
    config: LayerConfig, method: MethodRecord, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """Each expert's row-major matrix, copied only if strided otherwise. Raises InputError.

    They are bfloat16, or, where the method rounds them anyway, float16 or float32.
    """
    dtypes = (torch.bfloat16,) if method.quantise is None else (torch.bfloat16, torch.float16, torch.float32)
    wide = (config.num_experts, config.moe_intermediate_size, config.hidden_size)
    tall = (config.num_experts, config.hidden_size, config.moe_intermediate_size)
    checked = []
    for name, tensor, shape in (("gate_proj", gate, wide), ("up_proj", up, wide), ("down_proj", down, tall)):
        if tensor.shape != shape:
            raise InputError(
                f"layer {config.layer_idx}: {name} has shape {list(tensor.shape)}, expected {list(shape)}."
            )
        if tensor.dtype not in dtypes or not tensor.is_cpu:
            raise InputError(
                f"layer {config.layer_idx}: {name} is {tensor.dtype} on {tensor.device}, expected "
                f"{' or '.join(map(str, dtypes))} on cpu; convert it with .to('cpu', torch.bfloat16) if the "
                "rounding is acceptable."
            )
        checked.append([matrix.contiguous() for matrix in tensor.detach().unbind()])
    gate_matrices, up_matrices, down_matrices = checked
    return gate_matrices, up_matrices, down_matrices
