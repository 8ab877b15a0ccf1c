"""One MoE layer of a served model: the experts of SGLang's own method, and the hybrid engine around them.

SGLang makes the layer, loads the device's experts and asks for the output; everything in between is
kt_kernel/hybrid's. Each rank of a tensor-parallel group has its share of the CPU's experts (cpu_shares.py):
the model's usual all-reduce adds them up.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.moe.fused_moe_triton import layer as fused_moe
from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput
from sglang.srt.layers.moe.topk import TopKOutputChecker
from sglang.srt.layers.quantization.base_config import FusedMoEMethodBase
from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod
from sglang.srt.utils import is_cuda

from kt_kernel.cpu_share import CpuShare
from kt_kernel.errors import (
    CallOrderError,
    CheckpointError,
    ConfigurationError,
    FeatureUnavailableError,
    InputError,
)
from kt_kernel.hybrid.layer import HybridLayer
from kt_kernel.hybrid.slots import EMPTY, LayerPlacement, Placement
from kt_kernel.integrations.sglang import cpu_operators, device_backends
from kt_kernel.integrations.sglang.cpu_shares import share_of_rank
from kt_kernel.integrations.sglang.device_experts import (
    SglangExperts,
    device_of,
    resident_format,
    spare_experts,
)
from kt_kernel.integrations.sglang.pipeline import last_layer_here
from kt_kernel.integrations.sglang.rank_cores import options_of_rank
from kt_kernel.integrations.sglang.served_adapter import DeviceDelta, adapt, forget_adapter
from kt_kernel.integrations.sglang.served_model import FAILURES, ServedModel, serve
from kt_kernel.integrations.sglang.settings import KTSettings
from kt_kernel.integrations.sglang.startup_failure import reported
from kt_kernel.moe import KTMoEWrapper
from kt_kernel.operators.recorded_step import refuse as refuse_recording

# Attributes of this class itself; all others are the wrapped method's.
_OWN_ATTRIBUTES = (
    "gpu_method",
    "wrapper",
    "share",
    "placement",
    "served",
    "hybrid",
    "_operator_handle",
)


class HybridMoEMethod(FusedMoEMethodBase):
    """Wraps the method SGLang would have used (`gpu_method`) and keeps its contract.

    In particular the output carries the model's routed scaling factor exactly where the wrapped method's
    would: inside on a GPU, whose kernels apply it, and not on a CPU, where the models apply it afterwards.
    """

    def __init__(self, gpu_method: FusedMoEMethodBase, settings: KTSettings, layer_idx: int) -> None:
        self.gpu_method = gpu_method
        self.settings = settings
        self.layer_idx = layer_idx
        self.share: CpuShare | None = None
        self.wrapper: KTMoEWrapper | None = None
        self.placement: LayerPlacement | None = None
        self.served: ServedModel | None = None
        self.hybrid: HybridLayer | None = None
        self._operator_handle: int | None = None
        # Read by SGLang, whose own test asks for the class of the method, and by the models' routing.
        self.fuse_routed_scaling_factor_in_topk = False

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
        """Device weights with one slot per device expert, and the CPU layer where this rank has a share."""
        with reported():
            self._check_layer(layer, attributes)
            mask = self.settings.device_mask(self.layer_idx, num_experts)
            self.placement = LayerPlacement(Placement.initial(mask))
            self.share = share_of_rank(
                self.settings, layer.intermediate_size_per_partition * layer.moe_tp_size
            )
            if self.share.size:
                self.wrapper = self._make_wrapper(layer, num_experts, hidden_size)
            delta = self._device_delta()
        # The loaders of `layer` follow the layout of the method that really holds weights.
        layer.weight_load_method = self.gpu_method
        attributes["weight_loader"] = _SlotLoader(layer, self.placement.current, delta)
        # Some methods size their tensors, or loop, by these instead of by the argument.
        slots = self.placement.current.capacity
        layer.num_local_experts = layer.moe_runner_config.num_local_experts = slots
        self.gpu_method.create_weights(
            layer=layer,
            num_experts=slots,
            hidden_size=hidden_size,
            intermediate_size_per_partition=intermediate_size_per_partition,
            params_dtype=params_dtype,
            **attributes,
        )
        self._make_room_for_all_input_scales(layer, num_experts)

    def _device_delta(self) -> DeviceDelta | None:
        """None without experts on the device."""
        if not self.placement.current.capacity:
            return None
        is_unquantised = isinstance(self.gpu_method, UnquantizedFusedMoEMethod)
        return DeviceDelta(self.settings, self.layer_idx, is_unquantised=is_unquantised)

    def _make_room_for_all_input_scales(self, layer: torch.nn.Module, num_experts: int) -> None:
        """Input scales that SGLang reduces over the experts are loaded for all of them, also the CPU's.

        A row per expert: those with a slot in the slots' order, then the others. NVFP4's have it already.
        """
        for name, parameter in layer.named_parameters(recurse=False):
            if not name.endswith("_input_scale"):
                continue
            if device_backends.reduces_input_scales(self.gpu_method, layer):
                rows = parameter.data.new_ones(num_experts, *parameter.shape[1:])
                rows[: parameter.shape[0]] = parameter.data
                parameter.data = rows
                parameter.kt_has_all_experts = True
            elif getattr(parameter, "_sglang_require_global_experts", False):
                parameter.kt_has_all_experts = True

    def _make_wrapper(self, layer: torch.nn.Module, num_experts: int, hidden_size: int) -> KTMoEWrapper:
        return options_of_rank(self.settings).wrapper(
            layer_idx=self.layer_idx,
            num_experts=num_experts,
            # SGLang's code for Hunyuan does not tell the layer.
            num_experts_per_tok=layer.top_k or self.settings.layout.top_k,
            hidden_size=hidden_size,
            moe_intermediate_size=self.share.whole,
            share=self.share,
            chunked_prefill_size=self.settings.max_tokens,
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
            (config.gemm1_beta not in (None, 1.0), f"the activation offset {config.gemm1_beta}"),
            (config.apply_router_weight_on_input, "router weights applied to the input"),
        ):
            if is_so:
                raise FeatureUnavailableError(
                    f"not available yet: layer {self.layer_idx} has {what}; serve this model without the "
                    "--kt flags."
                )

    def create_moe_runner(self, layer: torch.nn.Module, moe_runner_config: Any) -> None:
        # The CPU's experts read the same tokens, and a second set of experts on the device may, too.
        moe_runner_config.inplace = False
        self.moe_runner_config = moe_runner_config
        self.gpu_method.create_moe_runner(layer, moe_runner_config)
        with reported():
            device_backends.check_method(self.gpu_method, layer)
        self.fuse_routed_scaling_factor_in_topk = fused_moe._fuses_routed_scaling_factor_in_topk(
            self.gpu_method, self.gpu_method.get_moe_runner_backend(layer)
        )

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        if self.hybrid is not None:
            raise CallOrderError(
                f"layer {self.layer_idx}: the weights of CPU experts cannot be replaced while serving; "
                "restart the server with the new --kt-weight-path."
            )
        if self.placement.current.capacity:
            self.gpu_method.process_weights_after_loading(layer)
        with reported():
            if self.wrapper is not None:
                self.wrapper.load_weights(None)
                adapt(self.settings, self.wrapper, self.layer_idx, layer.moe_runner_config)
            self.served = serve(self.settings, device_of(layer), self.share)
            self.hybrid = self._hybrid_layer(layer)
            if self.layer_idx == last_layer_here(self.settings):
                # SGLang gives what memory is left now to the KV cache.
                self.served.hybrid.prepare()
                forget_adapter()
            self._operator_handle = self._handle_for_operator(layer)
            if self._operator_handle is not None:
                self.hybrid.statistics.count_from(lambda: self.wrapper.moe.expert_uses)

    def _handle_for_operator(self, layer: torch.nn.Module) -> int | None:
        """The CPU layer's, where it computes every call alone: then one operator does."""
        options = self.settings.options
        alone = (
            self.wrapper is not None
            and device_of(layer).type == "cpu"
            and self.placement.current.capacity == 0
            and options.max_deferred_experts_per_token == 0
            and options.gpu_prefill_token_threshold == 0
            and not self.settings.records
            and not options.verify
        )
        return self.wrapper.moe.handle if alone and cpu_operators.is_open() else None

    def _hybrid_layer(self, layer: torch.nn.Module) -> HybridLayer:
        slots = self.placement.current.capacity
        resident = SglangExperts(layer, self.gpu_method, slots, filled_as=None) if slots else None
        hybrid = HybridLayer(
            self.layer_idx,
            self.wrapper,
            resident,
            self.placement,
            lambda count: spare_experts(layer, self.gpu_method, count, hybrid.encoding),
            self.served.hybrid,
            cpu_weight_factor=self._factor_of_device(layer),
        )
        options = self.settings.options
        if resident is not None and options.hybrid().copies_experts:
            resident.filled_as = resident_format(layer, self.gpu_method, hybrid.encoding)
            if options.enable_dynamic_expert_update and resident.filled_as is None:
                raise FeatureUnavailableError(
                    f"not available yet: --kt-enable-dynamic-expert-update for experts that SGLang holds on "
                    f"the device as {type(self.gpu_method).__name__} made them; leave it out."
                )
        return hybrid

    def _factor_of_device(self, layer: torch.nn.Module) -> float:
        """The routed scaling factor where the device's kernels apply it themselves: NVIDIA's do."""
        factor = self.moe_runner_config.routed_scaling_factor
        in_kernels = is_cuda() and device_of(layer).type == "cuda"
        if not in_kernels or factor is None or layer.should_fuse_routed_scaling_factor_in_topk:
            return 1.0
        return factor

    # ---- the forward pass --------------------------------------------------------------------

    def apply(self, layer: torch.nn.Module, dispatch_output: Any) -> StandardCombineInput:
        """The routed experts' weighted sum [tokens, hidden]; never changes the tensors it is given."""
        topk = dispatch_output.topk_output
        if TopKOutputChecker.format_is_bypassed(topk):
            topk = topk.to_standard()
        if not TopKOutputChecker.format_is_standard(topk):
            raise ConfigurationError(
                f"layer {self.layer_idx}: routing arrives as {type(topk).__name__}, but the CPU experts "
                "need ids and weights; choose another --moe-runner-backend."
            )
        hidden = dispatch_output.hidden_states
        try:
            output = self._computed(hidden, topk.topk_ids, topk.topk_weights)
        except FAILURES as error:
            # The pass goes on, so that all ranks take part in its all-reduces; its requests then fail.
            self.served.failed(error)
            output = torch.zeros_like(hidden)
        return StandardCombineInput(hidden_states=output)

    def _computed(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        if self._operator_handle is None:
            refuse_recording("experts of which some may be on a device")
            return self.hybrid.forward(hidden, ids, weights)
        try:
            return torch.ops.kt_kernel.experts(self._operator_handle, hidden, ids, weights)
        except (ValueError, RuntimeError) as error:
            raise InputError(f"layer {self.layer_idx}: {error}") from error

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
    """The `weight_loader` of the device weights: keeps the experts that have a slot, and drops the others
    except their input scales where SGLang reduces these over all experts.
    """

    def __init__(self, layer: torch.nn.Module, placement: Placement, delta: DeviceDelta | None) -> None:
        self._layer = layer
        self._placement = placement
        self._delta = delta
        cold = (expert for expert in range(placement.num_experts) if placement.slot(expert) == EMPTY)
        # expert -> row of a tensor with a row for each: never a slot's.
        self._row_of_cold = {expert: placement.capacity + at for at, expert in enumerate(cold)}

    def __call__(
        self,
        param: torch.nn.Parameter,
        loaded_weight: torch.Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int | None = None,
    ) -> None:
        """One expert's matrix; without an `expert_id`, those of all experts [experts, ...] in one tensor."""
        if expert_id is None:
            self._load_all(param, loaded_weight, weight_name, shard_id)
            return
        row = self._placement.slot(expert_id)
        if row == EMPTY:
            if not getattr(param, "kt_has_all_experts", False):
                return
            row = self._row_of_cold[expert_id]
        elif self._delta is not None and loaded_weight.dim() == 2:  # not a bias
            loaded_weight = self._delta.added(loaded_weight, expert_id, shard_id)
        self._layer._weight_loader_impl(
            param=param,
            loaded_weight=loaded_weight,
            weight_name=weight_name,
            shard_id=shard_id,
            expert_id=row,
        )

    def _load_all(
        self, param: torch.nn.Parameter, loaded_weight: torch.Tensor, weight_name: str, shard_id: str
    ) -> None:
        if loaded_weight.shape[0] != self._placement.num_experts:
            with reported():
                raise CheckpointError(
                    f"{weight_name} has shape {list(loaded_weight.shape)}, but the layer has "
                    f"{self._placement.num_experts} experts; download the checkpoint again."
                )
        if self._placement.count:
            if self._delta is not None:
                self._delta.refuse_stacked(weight_name)
            chosen = loaded_weight[list(self._placement.expert_of_slot)]
            self._layer.weight_loader_fused(param, chosen, weight_name, shard_id)


def _swiglu_limit(config: Any) -> float:
    """SGLang has two names for the limit of gate and up: DeepSeek-V4's, and the one of MiniMax-M3."""
    return config.swiglu_limit or config.gemm1_clamp_limit or 0.0
