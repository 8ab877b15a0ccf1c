"""Runs in an interpreter of its own, with SGLang: what a layer may be, and the factor its device applies.

Standard output: one JSON line per layer that is refused, its sentence; then the factors.
"""

import json
from types import SimpleNamespace

import torch
from sglang.srt.plugins import load_plugins

load_plugins()

from kt_kernel.errors import FeatureUnavailableError  # noqa: E402 - after SGLang's plug-ins
from kt_kernel.integrations.sglang import moe_method  # noqa: E402

PLAIN = {
    "activation": "silu",
    "is_gated": True,
    "gemm1_beta": None,
    "apply_router_weight_on_input": False,
    "routed_scaling_factor": 2.5,
}


def layer(*, ep: int = 1, fused: int = 0, in_topk: bool = False, **config):
    return SimpleNamespace(
        moe_ep_size=ep,
        num_fused_shared_experts=fused,
        should_fuse_routed_scaling_factor_in_topk=in_topk,
        moe_runner_config=SimpleNamespace(**PLAIN | config),
    )


method = object.__new__(moe_method.HybridMoEMethod)
method.layer_idx = 3
method._check_layer(layer(), {})
for refused in (
    {"ep": 2},
    {"fused": 1},
    {"activation": "gelu"},
    {"is_gated": False},
    {"gemm1_beta": 0.5},
    {"apply_router_weight_on_input": True},
):
    try:
        method._check_layer(layer(**refused), {})
        print(json.dumps("not refused"))
    except FeatureUnavailableError as error:
        print(json.dumps(str(error)))

factors = []
for on_cuda, device, changes in (
    (True, "cuda", {}),
    (True, "cuda", {"in_topk": True}),
    (True, "cuda", {"routed_scaling_factor": None}),
    (True, "cpu", {}),
    (False, "cpu", {}),
):
    moe_method.is_cuda = lambda on_cuda=on_cuda: on_cuda
    moe_method.device_of = lambda _, device=device: torch.device(device)
    method.moe_runner_config = layer(**changes).moe_runner_config
    factors.append(method._factor_of_device(layer(**changes)))
print(json.dumps(factors))
