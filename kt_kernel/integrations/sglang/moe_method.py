"""One MoE layer of a served model: the experts of a mask in SGLang's own kernels, all others in ours.

A forward pass hands the tokens to the CPU engine, runs the device's experts meanwhile with the ids of the
others replaced by -1, then adds the two sums. Only rank 0 of a tensor-parallel group owns CPU experts, and
computes them in full width: the model's usual all-reduce then counts them once.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput
from sglang.srt.layers.moe.topk import TopKOutputChecker
from sglang.srt.layers.quantization.base_config import FusedMoEMethodBase
from sglang.srt.runtime_context import get_parallel

from kt_kernel import KTMoEWrapper
from kt_kernel.errors import CallOrderError, ConfigurationError, FeatureUnavailableError
from kt_kernel.hybrid.slots import ExpertSlots
from kt_kernel.integrations.sglang.settings import KTSettings
from kt_kernel.integrations.sglang.startup_failure import reported

# Attributes of this class itself; all others are the wrapped method's.
_OWN_ATTRIBUTES = ("gpu_method", "wrapper", "slots")


class HybridMoEMethod(FusedMoEMethodBase):
    """Wraps the method SGLang would have used (`gpu_method`) and keeps its contract.

    In particular the output carries the model's routed scaling factor exactly where the wrapped method's
    would: inside on a GPU, whose kernels apply it, and not on a CPU, where the models apply it afterwards.
    """

    def __init__(self, gpu_method: FusedMoEMethodBase, settings: KTSettings, layer_idx: int) -> None:
        self.gpu_method = gpu_method
        self.settings = settings
        self.layer_idx = layer_idx
        self.wrapper: KTMoEWrapper | None = None
        self.slots: ExpertSlots | None = None

    # ---- making and loading ------------------------------------------------------------------

    def create_weights(
        self,
        layer: torch.nn.Module,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **attributes: Any,
    ) -> None:
        """Device weights with one slot per device expert, and on rank 0 the CPU layer."""
        with reported():
            self._check_layer(layer, attributes)
            self.slots = ExpertSlots(self.settings.device_mask(self.layer_idx, num_experts))
            if get_parallel().tp_rank == 0:
                self.wrapper = self._make_wrapper(layer, num_experts, hidden_size)
        # The loaders of `layer` follow the layout of the method that really holds weights.
        layer.weight_load_method = self.gpu_method
        attributes["weight_loader"] = _SlotLoader(layer, self.slots)
        self.gpu_method.create_weights(
            layer=layer,
            num_experts=self.slots.count,
            hidden_size=hidden_size,
            intermediate_size_per_partition=intermediate_size_per_partition,
            params_dtype=params_dtype,
            **attributes,
        )

    def _make_wrapper(self, layer: torch.nn.Module, num_experts: int, hidden_size: int) -> KTMoEWrapper:
        settings = self.settings
        return KTMoEWrapper(
            layer_idx=self.layer_idx,
            num_experts=num_experts,
            num_experts_per_tok=layer.top_k,
            hidden_size=hidden_size,
            moe_intermediate_size=layer.intermediate_size_per_partition * layer.moe_tp_size,
            gpu_experts_mask=self.slots.mask,
            cpuinfer_threads=settings.threads,
            threadpool_count=settings.pools,
            numa_nodes=settings.numa_nodes,
            weight_path=settings.weight_path,
            chunked_prefill_size=settings.max_tokens,
            method=settings.method,
            # The last MoE layer of the model never defers: kt_kernel/deferral.py.
            max_deferred_experts_per_token=min(settings.max_deferred, layer.top_k),
            swiglu_limit=_swiglu_limit(layer.moe_runner_config),
            swiglu_alpha=layer.moe_runner_config.gemm1_alpha or 0.0,
        )

    def _check_layer(self, layer: torch.nn.Module, attributes: dict[str, Any]) -> None:
        config = layer.moe_runner_config
        for is_so, what in (
            (layer.moe_ep_size != 1, f"expert parallelism over {layer.moe_ep_size} ranks"),
            (layer.num_fused_shared_experts > 0, "shared experts fused into the routed ones"),
            (config.activation != "silu", f"the activation {config.activation!r}"),
            (not config.is_gated, "experts without a gate projection"),
            (
                config.gemm1_alpha is not None and config.gate_up_interleaved,
                "gate and up projections in alternating rows",
            ),
            (config.gemm1_beta not in (None, 1.0), f"the activation offset {config.gemm1_beta}"),
            (config.apply_router_weight_on_input, "router weights applied to the input"),
            (bool(attributes.get("with_bias")), "experts with biases"),
        ):
            if is_so:
                raise FeatureUnavailableError(
                    f"not available yet: layer {self.layer_idx} has {what}; serve this model without the "
                    "--kt flags."
                )

    def create_moe_runner(self, layer: torch.nn.Module, moe_runner_config: Any) -> None:
        self.moe_runner_config = moe_runner_config
        moe_runner_config.num_local_experts = self.slots.count
        self.gpu_method.create_moe_runner(layer, moe_runner_config)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        if self.slots.count:
            self.gpu_method.process_weights_after_loading(layer)
        if self.wrapper is None:
            return
        if self.wrapper.moe is not None:
            raise CallOrderError(
                f"layer {self.layer_idx}: the weights of CPU experts cannot be replaced while serving; "
                "restart "
                "the server with the new --kt-weight-path."
            )
        with reported():
            self.wrapper.load_weights(None)

    # ---- the forward pass --------------------------------------------------------------------

    def apply(self, layer: torch.nn.Module, dispatch_output: Any) -> StandardCombineInput:
        """The routed experts' weighted sum [tokens, hidden]; never changes the tensors it is given."""
        topk = dispatch_output.topk_output
        if TopKOutputChecker.format_is_bypassed(topk):
            topk = topk.to_standard()
        if not TopKOutputChecker.format_is_standard(topk):
            raise ConfigurationError(
                f"layer {self.layer_idx}: routing arrives as {type(topk).__name__}, but the CPU experts "
                "need ids and "
                "weights; choose another --moe-runner-backend."
            )
        hidden = dispatch_output.hidden_states
        if self.slots.count == 0:
            return StandardCombineInput(hidden_states=self._on_cpu_alone(layer, hidden, topk))
        stream = _stream_of(hidden)
        if self.wrapper is not None:
            weights = self._cpu_weights(layer, hidden, topk)
            self.wrapper.submit_forward(hidden, topk.topk_ids, weights, stream)
        output = self._on_device(layer, dispatch_output, topk)
        if self.wrapper is not None:
            output = output + self.wrapper.sync_forward(hidden, stream)
        return StandardCombineInput(hidden_states=output)

    def _on_cpu_alone(self, layer: torch.nn.Module, hidden: torch.Tensor, topk: Any) -> torch.Tensor:
        if self.wrapper is None:
            return torch.zeros_like(hidden)
        weights = self._cpu_weights(layer, hidden, topk)
        return self.wrapper.forward(hidden, topk.topk_ids, weights, _stream_of(hidden))

    def _on_device(self, layer: torch.nn.Module, dispatch_output: Any, topk: Any) -> torch.Tensor:
        if dispatch_output.hidden_states.shape[0] == 0:
            return torch.zeros_like(dispatch_output.hidden_states)
        # A new tensor of ids: the CPU engine may still be reading the ones it was given.
        topk = topk._replace(topk_ids=self.slots.from_ids(topk.topk_ids))
        return self.gpu_method.apply(layer, dispatch_output._replace(topk_output=topk)).hidden_states

    def _cpu_weights(self, layer: torch.nn.Module, hidden: torch.Tensor, topk: Any) -> torch.Tensor:
        """Routing weights for the CPU experts, with the scaling factor if the device's kernels apply it
        themselves.
        """
        factor = self.moe_runner_config.routed_scaling_factor
        if hidden.is_cpu or factor is None or layer.should_fuse_routed_scaling_factor_in_topk:
            return topk.topk_weights
        return topk.topk_weights * factor

    # ---- everything else is the wrapped method's ---------------------------------------------

    def get_moe_runner_backend(self, layer: torch.nn.Module) -> Any:
        return self.gpu_method.get_moe_runner_backend(layer)

    def get_moe_routing_method_type(self, layer: torch.nn.Module, requested_method: Any) -> Any:
        return self.gpu_method.get_moe_routing_method_type(layer, requested_method)

    @property
    def runner(self) -> Any:
        return self.gpu_method.runner

    def __getattr__(self, name: str) -> Any:
        if name in _OWN_ATTRIBUTES:
            raise AttributeError(name)
        return getattr(self.gpu_method, name)


class _SlotLoader:
    """The `weight_loader` of the device weights: keeps the experts that have a slot, and drops the others."""

    def __init__(self, layer: torch.nn.Module, slots: ExpertSlots) -> None:
        self._layer = layer
        self._slots = slots

    def __call__(
        self,
        param: torch.nn.Parameter,
        loaded_weight: torch.Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int | None = None,
    ) -> None:
        if expert_id is None:
            with reported():
                raise FeatureUnavailableError(
                    f"not available yet: {weight_name} holds all experts in one tensor; convert the "
                    "checkpoint to one "
                    "tensor per expert."
                )
        slot = self._slots.slot(expert_id)
        if slot >= 0:
            self._layer._weight_loader_impl(
                param=param,
                loaded_weight=loaded_weight,
                weight_name=weight_name,
                shard_id=shard_id,
                expert_id=slot,
            )


def _swiglu_limit(config: Any) -> float:
    """SGLang has two names for the limit of gate and up: DeepSeek-V4's, and the one of MiniMax-M3."""
    return config.swiglu_limit or config.gemm1_clamp_limit or 0.0


def _stream_of(tensor: torch.Tensor) -> int | None:
    """The raw handle of the stream that SGLang works on, None on a CPU."""
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else None
