"""SGLang's FusedMoE layers on the machine of cuda_code.py: as SGLang makes them, and through our method.

    with served(backend="marlin"):
        stock = make_layer(config)                      # SGLang's own method, EXPERTS experts
        ours = make_layer(config, slots=SLOTS)          # HybridMoEMethod around it, fewer slots than experts

Import only after cuda_code.enter().
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.layers.moe.fused_moe_triton import layer as fused_moe
from sglang.srt.layers.moe.token_dispatcher import StandardDispatchOutput
from sglang.srt.layers.moe.topk import StandardTopKOutput
from sglang.srt.layers.moe.utils import initialize_moe_config
from sglang.srt.runtime_context import get_context, get_parallel

from kt_kernel.hybrid.layout import ExpertLayout
from kt_kernel.integrations.options import ExpertOptions
from kt_kernel.integrations.sglang import device_experts, served_model
from kt_kernel.integrations.sglang.layer_hooks import KTEPWrapperMethod, LayerSettings
from kt_kernel.integrations.sglang.moe_method import HybridMoEMethod
from kt_kernel.integrations.sglang.settings import KTSettings

# Primes and powers of two: a dimension that is EXPERTS or SLOTS is one of experts, not of anything else.
EXPERTS, SLOTS, TOP_K, TOKENS = 23, 7, 3, 5
HIDDEN, INTERMEDIATE = 512, 256
FACTOR = 2.5

Loader = Callable[[torch.nn.Module], None]


@contextlib.contextmanager
def served(backend: str = "auto", **options: Any) -> Iterator[None]:
    """SGLang's process-wide configuration of a server with that MoE backend."""
    with (
        get_context().override_server_args(device="cuda", moe_runner_backend=backend, **options),
        get_parallel().override(
            tp_rank=0, moe_tp_rank=0, moe_ep_rank=0, tp_group=SimpleNamespace(world_size=1)
        ),
    ):
        initialize_moe_config()
        yield


def settings_of(slots: int) -> KTSettings:
    return KTSettings(
        ExpertOptions(
            weight_path="unused",
            method="BF16",
            cpuinfer=1,
            threadpool_count=1,
            num_gpu_experts=slots,
            expert_placement_strategy="random",
        ),
        ExpertLayout(num_layers=1, moe_layers=(0,), num_experts=EXPERTS),
        max_tokens=64,
    )


def make_layer(
    quant_config: Any = None,
    slots: int | None = None,
    device: str = "cpu",
    **attributes: Any,
) -> torch.nn.Module:
    """A layer before its weights are loaded; `slots`: through our method, None = as without the plug-in."""
    kt = None if slots is None else LayerSettings(settings_of(slots), 0)
    fused_moe.create_kt_config_from_server_args = lambda *_: kt
    fused_moe.KTEPWrapperMethod = KTEPWrapperMethod
    # As on the ranks without CPU experts: what is tested is the device's half.
    HybridMoEMethod._make_wrapper = lambda *_: None
    served_model._served.clear()
    values = {"routed_scaling_factor": FACTOR, "inplace": False, "params_dtype": torch.bfloat16}
    with torch.device(device):
        return fused_moe.FusedMoE(
            num_experts=EXPERTS,
            hidden_size=HIDDEN,
            intermediate_size=INTERMEDIATE,
            layer_id=0,
            top_k=TOP_K,
            quant_config=quant_config,
            prefix="model.layers.0.mlp.experts",
            **(values | attributes),
        )


def method_of(layer: torch.nn.Module) -> Any:
    """The method that holds the device's weights."""
    return getattr(layer.quant_method, "gpu_method", layer.quant_method)


def compute(layer: torch.nn.Module) -> torch.Tensor:
    """One call of the device's experts, with gaps in the routing where our method leaves them."""
    generator = torch.Generator().manual_seed(0)
    device = next(layer.parameters()).device
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator).to(layer.params_dtype).to(device)
    weights = torch.rand(TOKENS, TOP_K, generator=generator).to(device)
    placement = getattr(layer.quant_method, "placement", None)
    slots = EXPERTS if placement is None else placement.current.capacity
    ids = torch.randint(0, slots, (TOKENS, TOP_K), generator=generator, dtype=torch.int32).to(device)
    if placement is not None:
        experts = device_experts.SglangExperts(layer, method_of(layer), slots, None)
        return experts.compute(hidden, torch.where(ids == 1, -1, ids), weights)
    routing = StandardTopKOutput(weights, ids, torch.zeros(TOKENS, EXPERTS, device=device))
    dispatched = StandardDispatchOutput(hidden_states=hidden, hidden_states_scale=None, topk_output=routing)
    return layer.quant_method.apply(layer, dispatched).hidden_states
