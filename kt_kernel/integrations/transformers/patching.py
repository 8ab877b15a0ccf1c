"""`patch`: a model of transformers whose routed experts are computed by the hybrid engine."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from kt_kernel.checkpoint.sources import open_experts
from kt_kernel.errors import CallOrderError, CheckpointError, ConfigurationError, FeatureUnavailableError
from kt_kernel.hybrid.layer import HybridLayer
from kt_kernel.hybrid.layout import ExpertLayout
from kt_kernel.hybrid.model import HybridModel
from kt_kernel.hybrid.slots import LayerPlacement, Placement
from kt_kernel.hybrid.torch_experts import TorchDeviceExperts
from kt_kernel.integrations.options import ExpertOptions
from kt_kernel.integrations.transformers.blocks import ExpertsBlock, find_experts, replace_module
from kt_kernel.integrations.transformers.experts import HybridExperts
from kt_kernel.integrations.transformers.sequences import requests_of
from kt_kernel.moe import KTMoEWrapper

Model = TypeVar("Model", bound=nn.Module)

# What families call the number of experts of a token.
_EXPERTS_PER_TOKEN = ("num_experts_per_tok", "moe_k", "moe_topk")

# transformers runs a whole prompt in one call, and its attention needs more memory for it than we do.
MOST_TOKENS = 1 << 20


def patch(model: Model, **options: Any) -> Model:
    """Replace the experts of `model`, in place, by those in the checkpoint at `weight_path`; returns `model`.

    `options` are the fields of `ExpertOptions`. The expert weights that `model` had are dropped; all its
    other weights must be on one device, where its resident experts go in the same dtype. Afterwards `model`
    is for inference only, and `model.kt` is its `HybridModel`: `report()` says where experts live and how
    they do, `begin_step()` must be called before each replay of a captured graph, `close()` ends its threads.

    Raises ConfigurationError or FeatureUnavailableError if the model cannot be patched, CheckpointError if
    the weights do not fit it; the model is then as it was.
    """
    if "weight_path" not in options:
        raise ConfigurationError(
            "weight_path is not given, expected the directory or GGUF file with the expert weights (this "
            f"model was loaded from {getattr(model, 'name_or_path', '')!r}); give patch(model, "
            "weight_path=...)."
        )
    chosen = ExpertOptions(**options)
    if isinstance(getattr(model, "kt", None), HybridModel):
        raise CallOrderError("the model is patched already; load it again to change its options.")
    if (getattr(model, "tp_size", None) or 1) > 1:
        raise FeatureUnavailableError(
            f"the model is spread over {model.tp_size} processes, which is not available here; load it in "
            "one process, or serve it with SGLang."
        )
    blocks = find_experts(model)
    device, dtype = _home(model, {block.path for block in blocks})
    config = model.config.get_text_config()
    layout = ExpertLayout(
        config.num_hidden_layers, blocks[0].num_experts, tuple(block.layer_idx for block in blocks)
    )
    chosen.log_placement()
    chosen.device_experts(layout)  # a wrong number ends here, before loading
    hybrid = HybridModel(chosen.hybrid(), device=device)
    try:
        chosen = chosen.with_method().with_threads()
        chosen.check_slots_filled_by_copies()
        check_rows(blocks, chosen)
        masks = chosen.device_masks(layout)
        builder = _LayerBuilder(experts_per_token(config), chosen, hybrid, dtype)
        layers = [builder.layer(block, masks[block.layer_idx]) for block in blocks]
        hybrid.prepare()
    except BaseException:
        hybrid.close()
        raise
    for block, layer in zip(blocks, layers, strict=True):
        replace_module(model, block.path, HybridExperts(layer))
    model.requires_grad_(requires_grad=False)
    model.kt = hybrid
    model.save_pretrained = _refuse_to_save(chosen.weight_path)
    _decoder(model).register_forward_pre_hook(_begin_step(hybrid, chosen), with_kwargs=True)
    return model.eval()


class _LayerBuilder:
    """Makes the hybrid layers of one model, whose tokens have `top_k` experts each."""

    def __init__(self, top_k: int, options: ExpertOptions, hybrid: HybridModel, dtype: torch.dtype) -> None:
        self._top_k = top_k
        self._options = options
        self._hybrid = hybrid
        self._dtype = dtype

    def layer(self, block: ExpertsBlock, mask: torch.Tensor) -> HybridLayer:
        """The layer of `block`, loaded; `mask` bool [E]: its experts on the device."""
        wrapper = self._wrapper(block)

        def new_experts(capacity: int) -> TorchDeviceExperts:
            return TorchDeviceExperts(
                capacity,
                block.hidden_size,
                block.intermediate_size,
                self._dtype,
                self._hybrid.device,
                encoding=wrapper.encoding(self._hybrid.ranks.size),
                swiglu_limit=block.swiglu.limit,
                swiglu_alpha=block.swiglu.alpha,
            )

        placement = LayerPlacement(Placement.initial(mask))
        slots = placement.current.capacity
        resident = new_experts(slots) if slots else None
        layer = HybridLayer(block.layer_idx, wrapper, resident, placement, new_experts, self._hybrid)
        if slots:
            layer.load_residents()
        return layer

    def _wrapper(self, block: ExpertsBlock) -> KTMoEWrapper:
        wrapper = self._options.wrapper(
            layer_idx=block.layer_idx,
            num_experts=block.num_experts,
            num_experts_per_tok=self._top_k,
            hidden_size=block.hidden_size,
            moe_intermediate_size=block.intermediate_size,
            chunked_prefill_size=MOST_TOKENS,
            swiglu_limit=block.swiglu.limit,
            swiglu_alpha=block.swiglu.alpha,
        )
        wrapper.load_weights(None)
        return wrapper


def check_rows(blocks: list[ExpertsBlock], options: ExpertOptions) -> None:
    """Names of tensors tell the order of gate's and up's rows, but another family may have the same names."""
    stored = open_experts(options.weight_path, options.method).gate_up_rows()
    for block in blocks:
        rows = stored.get(block.layer_idx, block.rows)
        if rows is not block.rows:
            raise CheckpointError(
                f"'{block.path}' of the model has {block.rows.value}, but the tensors of layer "
                f"{block.layer_idx} in '{os.fspath(options.weight_path)}' are called as those with "
                f"{rows.value}; take the weights and the config.json from the same model, or another model."
            )


def _home(model: nn.Module, experts: set[str]) -> tuple[torch.device, torch.dtype]:
    """The one device of everything but the experts, and the dtype in which it computes."""
    own = [
        (name, parameter)
        for name, parameter in model.named_parameters()
        if name.rpartition(".")[0] not in experts
    ]
    devices = sorted({str(parameter.device) for _, parameter in own})
    if len(devices) != 1 or devices[0] == "meta":
        raise ConfigurationError(
            f"the weights of {type(model).__name__} beside its experts are on {', '.join(devices)}, expected "
            "one device, cpu or cuda; load the model onto one (from_pretrained of "
            "kt_kernel.integrations.transformers does)."
        )
    # Of the largest weight: norms and routers are kept in float32 by some models.
    largest = max((parameter for _, parameter in own), key=torch.Tensor.numel)
    return largest.device, largest.dtype


def experts_per_token(config: Any) -> int:
    """How many experts a token has; raises FeatureUnavailableError if the configuration does not say it."""
    found = (getattr(config, name, None) for name in _EXPERTS_PER_TOKEN)
    top_k = next((value for value in found if value is not None), None)
    if isinstance(top_k, (list, tuple)) and len(set(top_k)) == 1:  # Hunyuan's has one for each layer
        top_k = top_k[0]
    if not isinstance(top_k, int):
        raise FeatureUnavailableError(
            f"the configuration of the model ({config.model_type}) does not say how many experts a token has "
            "(num_experts_per_tok); use another model."
        )
    return top_k


def _refuse_to_save(weight_path: str | os.PathLike) -> Callable[..., None]:
    def save_pretrained(*arguments: Any, **options: Any) -> None:
        """Raises FeatureUnavailableError: the experts are no parameters, and would be left out."""
        raise FeatureUnavailableError(
            "a patched model cannot be saved: its experts are packed for the CPU and would be missing "
            f"from the checkpoint; they are those of '{os.fspath(weight_path)}', copy that."
        )

    return save_pretrained


def _decoder(model: nn.Module) -> nn.Module:
    """The part that every forward pass goes through, also where a head on top is not called."""
    return getattr(model, "base_model", model)


def _begin_step(hybrid: HybridModel, chosen: ExpertOptions) -> Callable[..., None]:
    # What is deferred depends on all rows of a call anyway.
    threshold = 0 if chosen.max_deferred_experts_per_token else chosen.gpu_prefill_token_threshold

    @torch.compiler.disable
    def before_forward(module: nn.Module, arguments: tuple, options: dict[str, Any]) -> None:
        if not hybrid.backend.capturing():
            hybrid.begin_step(requests_of(arguments, options, threshold))

    return before_forward
