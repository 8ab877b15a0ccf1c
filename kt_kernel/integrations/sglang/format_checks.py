"""Small layers of SGLang in every format whose slots are filled natively, for `kt doctor --device`.

A server tries the formats of its own model when it starts (device_check.py); here all are tried, without one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from kt_kernel.formats.expert_image import ExpertEncoding
from kt_kernel.integrations.sglang.device_check import Verdict

# Powers of two that every group size divides, and MXFP4's padding leaves alone.
HIDDEN, INTERMEDIATE, _EXPERTS, _TOP_K = 512, 256, 4, 2
_FACTOR = 1.0


@dataclass(frozen=True)
class FormatCheck:
    """`quantisation` and `settings`: as in a checkpoint's config.json."""

    method: str
    quantisation: str
    settings: dict[str, Any]
    backend: str = "auto"
    group_size: int = 0
    scale_dtype: torch.dtype | None = None
    dtype: torch.dtype = torch.bfloat16  # of the model

    @property
    def encoding(self) -> ExpertEncoding:
        return ExpertEncoding(self.method, 1, HIDDEN, INTERMEDIATE, self.group_size, self.scale_dtype)

    def run(self, device: torch.device) -> Verdict:
        """Try slots of this format; never raises."""
        from kt_kernel.integrations.sglang.device_experts import tried

        try:
            with _configured(self.backend, device):
                layer = _layer(self._config(), device, self.dtype)
                return tried(layer, layer.quant_method, self.encoding)
        except Exception as problem:
            return Verdict(is_right=False, error=None, reason=f"{type(problem).__name__}: {problem}")

    def _config(self) -> Any:
        from sglang.srt.layers.quantization import get_quantization_config

        config = get_quantization_config(self.quantisation).from_config(self.settings)
        if self.method == "MXFP4":  # known from the model there, not from its quantisation
            config.is_fp4_experts = True
        return config


def _compressed(fmt: str, weights: dict[str, Any], inputs: dict[str, Any] | None = None) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {"quant_method": "compressed-tensors", "format": fmt, "ignore": [], "config_groups": {"g": group}}


def _numbers(bits: int, kind: str, strategy: str, group: int | None, *, dynamic: bool) -> dict[str, Any]:
    return {
        "num_bits": bits,
        "type": kind,
        "strategy": strategy,
        "group_size": group,
        "symmetric": True,
        "dynamic": dynamic,
    }


_PER_CHANNEL, _PER_TOKEN = (
    _numbers(8, "float", "channel", None, dynamic=False),
    _numbers(8, "float", "token", None, dynamic=True),
)
_GPTQ = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": 128,
    "desc_act": False,
    "sym": True,
    "lm_head": False,
}
_BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
_MX = {"quant_method": "mxfp8", "activation_scheme": "dynamic", "weight_block_size": [1, 32]}

FORMAT_CHECKS = (
    FormatCheck("FP8", "fp8", _BLOCKS, "triton"),
    FormatCheck(
        "FP8_PERCHANNEL",
        "compressed-tensors",
        _compressed("float-quantized", _PER_CHANNEL, _PER_TOKEN),
    ),
    FormatCheck("MXFP8", "mxfp8", _MX, "cutlass"),
    FormatCheck(
        "RAWINT4",
        "compressed-tensors",
        _compressed("pack-quantized", _numbers(4, "int", "group", 32, dynamic=False)),
        group_size=32,
        scale_dtype=torch.bfloat16,
    ),
    FormatCheck(  # SGLang keeps its scales in half precision, so the model must be, too
        "GPTQ_INT4", "gptq_marlin", _GPTQ, group_size=128, scale_dtype=torch.float16, dtype=torch.float16
    ),
    FormatCheck("MXFP4", "fp8", _BLOCKS, "marlin"),
    FormatCheck(
        "NVFP4",
        "compressed-tensors",
        _compressed("nvfp4-pack-quantized", _numbers(4, "float", "tensor_group", 16, dynamic=False)),
    ),
)


@contextmanager
def _configured(backend: str, device: torch.device) -> Iterator[None]:
    """SGLang's process-wide configuration of a server with that MoE backend and one rank."""
    from sglang.srt.layers.moe.utils import initialize_moe_config
    from sglang.srt.runtime_context import get_context, get_parallel

    with (
        get_context().override_server_args(device=device.type, moe_runner_backend=backend),
        get_parallel().override(
            tp_rank=0, moe_tp_rank=0, moe_ep_rank=0, tp_group=SimpleNamespace(world_size=1)
        ),
    ):
        initialize_moe_config()
        yield


def _layer(config: Any, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE

    make: Callable[..., torch.nn.Module] = FusedMoE
    with torch.device(device):
        return make(
            num_experts=_EXPERTS,
            hidden_size=HIDDEN,
            intermediate_size=INTERMEDIATE,
            layer_id=0,
            top_k=_TOP_K,
            quant_config=config,
            prefix="model.layers.0.mlp.experts",
            routed_scaling_factor=_FACTOR,
            inplace=False,
            params_dtype=dtype,
        )
