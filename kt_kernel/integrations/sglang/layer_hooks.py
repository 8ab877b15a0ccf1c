"""The two places where SGLang's MoE layer asks for the kt method: its settings and its constructor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kt_kernel.errors import ConfigurationError
from kt_kernel.integrations.sglang import hooking
from kt_kernel.integrations.sglang.settings import SETTINGS_ATTRIBUTE, KTSettings
from kt_kernel.integrations.sglang.startup_failure import reported


@dataclass(frozen=True)
class LayerSettings:
    server: KTSettings
    layer_idx: int


def layer_settings(original: Callable, server_args: Any, layer_idx: int) -> LayerSettings | None:
    """Around `create_kt_config_from_server_args`: None means that the layer is SGLang's own business."""
    from sglang.srt.runtime_context import get_flags

    with reported():
        settings = getattr(server_args, SETTINGS_ATTRIBUTE, None)
        if settings is None:
            if original(server_args, layer_idx) is not None:
                raise ConfigurationError(
                    "--kt-weight-path is set, but the plug-in's configuration step did not run; start the "
                    "server with "
                    "`python -m sglang.launch_server` or `sglang.Engine` of SGLang 0.5.23."
                )
            return None
        if get_flags().moe.in_speculative_scope:
            if settings.draft is None:
                return None  # draft.py has said what that means
            settings = settings.draft
            layer_idx += settings.layout.moe_layers[0]  # the draft model counts its layers from 0
        hooking.verify()
        return LayerSettings(settings, layer_idx)


class KTEPWrapperMethod:
    """What SGLang's modules see under this name: a constructor, never the class of the object it makes.

    deepseek_v2 and glm4_moe treat instances of the stock class as if its output lacked the routed scaling
    factor, on some of their code paths and on others not. Our method's output always means what the wrapped
    method's output means, so no such test may recognise it.
    """

    def __new__(cls, gpu_method: Any, kt_config: LayerSettings) -> Any:
        from kt_kernel.integrations.sglang.moe_method import HybridMoEMethod

        return HybridMoEMethod(gpu_method, kt_config.server, kt_config.layer_idx)
