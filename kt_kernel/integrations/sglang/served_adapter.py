"""An adapter for the whole server: LoRA of the experts beside their packed weights, of other layers in them.

The experts' LoRA is computed as it was trained, by the forward pass of training (kt_kernel/training), so
packed weights of every format stay as they are. Linear layers take theirs in while SGLang loads them, where
their weights are unquantised in the checkpoint or decoded on their way.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kt_kernel.adapters.backend import Call, ExpertLora, Needs
from kt_kernel.adapters.files import CONFIGURATION, LORA_KEY, layer_of, read_adapter
from kt_kernel.adapters.kernel_backend import KernelBackend
from kt_kernel.adapters.layout import lora_scale, stack
from kt_kernel.errors import CheckpointError, FeatureUnavailableError, InputError
from kt_kernel.integrations.sglang.settings import SETTINGS_ATTRIBUTE, KTSettings
from kt_kernel.moe import KTMoEWrapper

_NOTHING = Needs(x=False, weights=False, lora=False)
_REFUSED = ("use_dora", "modules_to_save", "alpha_pattern", "rank_pattern", "trainable_token_indices")


@dataclass(frozen=True)
class Adapter:
    """`experts`: by layer. `dense`: name of a weight in the checkpoint -> A [r, in] and B [out, r]."""

    scale: float
    experts: Mapping[int, ExpertLora]
    dense: Mapping[str, tuple[torch.Tensor, torch.Tensor]]


def adapter_of(settings: KTSettings | None) -> Adapter | None:
    """The server's adapter, read once in each process; None without one.

    Raises CheckpointError or CheckpointPathError if it cannot be read or is of another model, and
    FeatureUnavailableError for more than plain LoRA.
    """
    if settings is None or settings.adapter is None:
        return None
    return _read(settings.adapter, settings.layout.moe_layers, settings.layout.num_experts)


@functools.lru_cache(maxsize=2)
def _read(path: str, layers: tuple[int, ...], num_experts: int) -> Adapter:
    folder = Path(path)
    found, rest = read_adapter(folder, {layer: f"layers.{layer}.experts" for layer in layers})
    config = json.loads((folder / CONFIGURATION).read_text(encoding="utf-8"))
    for name in _REFUSED:
        if config.get(name):
            raise FeatureUnavailableError(
                f"not available yet: the adapter '{path}' has {name}, which a server cannot apply; write a "
                "merged checkpoint with kt sft export."
            )
    rank = config["r"]
    scale = lora_scale(rank, config["lora_alpha"], use_rslora=bool(config.get("use_rslora")))
    experts = {}
    for module, tensors in found.items():
        layer, where = layer_of(module), f"the adapter's experts at '{module}'"
        if layer not in layers:
            raise CheckpointError(f"{where}: the model has none there; take the adapter's own model.")
        stacked = {key: t.float() for key, t in stack(tensors, num_experts, rank, where).items()}
        order = [(projection, which) for projection in ("gate", "up", "down") for which in "AB"]
        experts[layer] = ExpertLora.of([stacked[key] for key in order], scale)
    return Adapter(scale, experts, _dense(rest))


def _dense(rest: Mapping[str, torch.Tensor]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    halves: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in rest.items():
        match = LORA_KEY.fullmatch(key)
        if match is None or "lora_embedding" in key:
            raise FeatureUnavailableError(
                f"not available yet: tensor '{key}' of the adapter is no LoRA of a linear layer; write a "
                "merged checkpoint with kt sft export."
            )
        halves.setdefault(f"{match[1]}.weight", {})[match[2]] = tensor
    return {name: (half["A"], half["B"]) for name, half in halves.items()}


def with_adapter(stream: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """The checkpoint's tensors, those of linear layers that the adapter changes with it in them."""
    from sglang.srt.runtime_context import get_server_args

    adapter = adapter_of(getattr(get_server_args(), SETTINGS_ATTRIBUTE, None))
    return stream if adapter is None or not adapter.dense else _added(stream, adapter)


def _added(
    stream: Iterator[tuple[str, torch.Tensor]], adapter: Adapter
) -> Iterator[tuple[str, torch.Tensor]]:
    left = dict(adapter.dense)
    for name, tensor in stream:
        if name in left:
            a, b = left.pop(name)
            if not tensor.is_floating_point() or tensor.shape != (len(b), a.shape[1]):
                raise CheckpointError(
                    f"'{name}' is {tensor.dtype} {list(tensor.shape)}, and the adapter adds "
                    f"[{len(b)}, {a.shape[1]}] to it; take the adapter's own model, where it is unquantised."
                )
            tensor = (tensor.float() + adapter.scale * (b.float() @ a.float())).to(tensor.dtype)
        yield name, tensor
    if left:
        raise CheckpointError(
            f"the adapter changes '{min(left)}', which the checkpoint does not have; take its own model."
        )


class AdaptedExperts:
    """The experts of one layer with their LoRA, on the CPU."""

    def __init__(self, wrapper: KTMoEWrapper, lora: ExpertLora) -> None:
        self._backend, self._lora = KernelBackend(wrapper), lora

    def compute(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The weighted sum of each token's experts, like `hidden` [T, H]; ids and weights [T, k]."""
        x = hidden.float() if hidden.dtype is torch.float16 else hidden
        call = Call(x, ids.to(torch.int64), weights.float(), self._lora)
        return self._backend.forward(call, _NOTHING)[0].to(hidden.dtype)


def adapted_experts(settings: KTSettings, wrapper: KTMoEWrapper | None, layer: int) -> AdaptedExperts | None:
    """What computes that layer of a loaded `wrapper` where the adapter has LoRA for it; raises InputError."""
    adapter = adapter_of(settings)
    if adapter is None or wrapper is None or layer not in adapter.experts:
        return None
    lora = adapter.experts[layer]
    sizes = (lora.gate_a.shape[2], lora.gate_b.shape[1])
    expected = (wrapper.hidden_size, wrapper.moe_intermediate_size)
    if sizes != expected:
        raise InputError(
            f"the adapter's experts of layer {layer} have hidden and intermediate sizes {sizes}, the model's "
            f"{expected}; take the adapter's own model."
        )
    return AdaptedExperts(wrapper, lora)


def check_adapter(settings: KTSettings, options: Any) -> None:
    """Raise a KTError for what an adapter cannot be together with; `options`: SGLang's."""
    if settings.adapter is None:
        return
    experts = settings.options
    for is_so, what in (
        (options.device != "cpu", f"--device {options.device}"),
        (options.tp_size > 1, f"--tp-size {options.tp_size}"),
        (options.pp_size > 1, f"--pp-size {options.pp_size}"),
        (settings.device_experts > 0, "experts on the device"),
        (experts.max_deferred_experts_per_token > 0, "--kt-max-deferred-experts-per-token"),
        (experts.gguf_mmap, "--kt-gguf-mmap"),
        (bool(experts.verify), "--kt-verify"),
        (options.speculative_algorithm is not None, "speculative decoding"),
    ):
        if is_so:
            raise FeatureUnavailableError(
                f"not available yet: --kt-expert-lora-path together with {what}; leave one of them out, or "
                "serve a merged checkpoint of kt sft export."
            )
    adapter_of(settings)
