"""Serving on a CPU with our operators: what SGLang must know beyond their names (doc/operators.md).

The gate is open before SGLang is imported (third_party/sglang-0.5.23-cpu); the hooks of this file are
registered where it is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from kt_kernel import kt_kernel_ext, operators
from kt_kernel.engine import get_engine
from kt_kernel.integrations.sglang.rank_cores import options_of_rank, threads_of
from kt_kernel.integrations.sglang.settings import SETTINGS_ATTRIBUTE
from kt_kernel.threads import plan_threads

logger = logging.getLogger(__name__)


def is_open() -> bool:
    """Do SGLang's modules call CPU operators in this process, and are they ours?"""
    from sglang.srt.utils import cpu_has_amx_support

    return bool(cpu_has_amx_support()) and hasattr(torch.ops.kt_kernel, "linear")


def start(runner: Any, *_: Any, **__: Any) -> None:
    """Before `ModelRunner.load_model`: the threads that compute, the CPU experts' where there are any."""
    from sglang.srt.runtime_context import get_parallel

    settings = getattr(runner.server_args, SETTINGS_ATTRIBUTE, None)
    parallel = get_parallel()
    rank, ranks = parallel.tp_rank, parallel.tp_size
    if settings is not None and (rank == 0 or settings.shares_experts):
        plan = threads_of(options_of_rank(settings))
        engine = get_engine(plan.threads, plan.pools, plan.numa_nodes)
    else:
        plan = plan_threads(kt_kernel_ext.topology())
        engine = get_engine(max(1, plan.threads // ranks))
    operators.use_engine(engine)
    logger.info("kt-kernel: its operators compute the model's layers on %d threads", engine.threads)


def has_kernels(original: Callable, weight: torch.Tensor) -> bool:
    """Around `dtype_is_supported`: float16 weights stay torch's, whose numbers bfloat16 lacks."""
    return weight.dtype in (torch.bfloat16, torch.float32)


def pack_head_of_floats(original: Callable, head: torch.nn.Module, *arguments: Any, **options: Any) -> None:
    """Around `ParallelLMHead.__init__`, which lets heads of two bytes a number be packed only."""
    from sglang.srt.layers.amx_utils import PackWeightMethod

    original(head, *arguments, **options)
    weight = getattr(head, "weight", None)
    if weight is not None and weight.dtype == torch.float32:
        head.quant_method = PackWeightMethod(weight_names=["weight"])


def route_in_floats(
    original: Callable, gate: torch.nn.Module, hidden_states: torch.Tensor, *arguments: Any, **options: Any
) -> torch.Tensor:
    """Around `MoEGate.forward`, which asks for float32 weights before it asks whether they are packed."""
    from sglang.srt.utils import use_intel_amx_backend

    if gate.weight.dtype != torch.float32 or not use_intel_amx_backend(gate):
        return original(gate, hidden_states, *arguments, **options)
    packed_linear = torch.ops.sgl_kernel.weight_packed_linear
    return packed_linear(hidden_states.float(), gate.weight, None, is_vnni=True)


def any_shape(original: Callable, weight: torch.Tensor) -> bool:
    """Around `dim_is_supported`: panels are padded."""
    return weight.dim() in (2, 3)


def pack(
    original: Callable, module: torch.nn.Module, weight_names: list[str], *rest: Any, **named: Any
) -> None:
    """Around `_amx_process_weight_after_loading`, for what it does not know.

    Experts that SGLang itself holds on the CPU are computed by torch, and so is the head with
    --enable-fp32-lm-head, which reads its numbers. The head's logits stay the fp32 sums that they are:
    bfloat16 rounds logits of 25 to steps of 0.125, and SGLang widens them at once.
    """
    from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead
    from sglang.srt.runtime_context import get_exec

    is_head = isinstance(module, ParallelLMHead)
    if "w13_weight" in weight_names or (is_head and get_exec().features.enable_fp32_lm_head):
        module.use_intel_amx_backend = False
        return
    original(module, weight_names, *rest, **named)
    if is_head and module.use_intel_amx_backend:
        torch.ops.kt_kernel.give_sums(module.weight)


def scaled_topk(
    original: Callable,
    *arguments: Any,
    routed_scaling_factor: float | None = None,
    apply_routed_scaling_factor_on_output: bool = False,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Around `fused_topk` on a CPU, which refuses a factor on the weights (MiniMax-M3): weights and ids."""
    weights, ids = original(*arguments, **options)
    if apply_routed_scaling_factor_on_output and routed_scaling_factor is not None:
        weights = weights * routed_scaling_factor
    return weights, ids


_PACKED = (
    "the weights of a model whose layers kt-kernel's operators compute are packed and cannot be {} while "
    "it is served; restart the server {}with --kt-cpu-operators off."
)


def refuse_new_weights(original: Callable, *_: Any, **__: Any) -> tuple[bool, str]:
    """Around the methods that write into the weights of a running model: packed ones are no matrices."""
    return False, _PACKED.format("replaced", "with the new ones, or ")


def refuse_export(original: Callable, *_: Any, **__: Any) -> str:
    """Around `WeightExporter._weight_export_unsupported_reason`, whose methods read them as matrices."""
    return _PACKED.format("read", "")
