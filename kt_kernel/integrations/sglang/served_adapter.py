"""An adapter for the whole server: LoRA of the experts beside their packed weights, of other layers in them.

On the CPU it is computed with the experts (kt_kernel/adapters/attach.py), so packed weights of every format
stay as they are. Experts on the device and linear layers take theirs in while SGLang loads them, where their
weights are unquantised in the checkpoint or decoded on their way.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kt_kernel.adapters.attach import attach
from kt_kernel.adapters.backend import ExpertLora
from kt_kernel.adapters.files import CONFIGURATION, LORA_KEY, layer_of, read_adapter
from kt_kernel.adapters.layout import is_fused, lora_scale, stack
from kt_kernel.adapters.limits import BESIDE_LORA, PATTERNS, VARIANTS, first_set
from kt_kernel.adapters.merged import UNQUANTISED, lora_shape, merged_matrix
from kt_kernel.errors import CheckpointError, FeatureUnavailableError, InputError
from kt_kernel.integrations.sglang.cpu_fixes import rows_in_turn
from kt_kernel.integrations.sglang.settings import SETTINGS_ATTRIBUTE, KTSettings
from kt_kernel.moe import KTMoEWrapper

_PROJECTIONS = {"w1": "gate", "w3": "up", "w2": "down"}  # what SGLang calls them


@dataclass(frozen=True)
class Adapter:
    """`experts`: by layer. `dense`: name of a weight in the checkpoint -> A [r, in] and B [out, r]. `fused`:
    the layers whose gate and up are one matrix in the file, gate's rows first."""

    scale: float
    experts: Mapping[int, ExpertLora]
    dense: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    fused: frozenset[int] = frozenset()


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
    name = first_set(config, (*VARIANTS, *BESIDE_LORA, *PATTERNS))
    if name is not None:
        raise FeatureUnavailableError(
            f"not available yet: the adapter '{path}' has {name}, which a server cannot apply; write a "
            "merged checkpoint with kt sft export."
        )
    if not {"r", "lora_alpha"} <= config.keys():
        raise CheckpointError(f"'{folder / CONFIGURATION}' has no r or no lora_alpha; give a LoRA adapter.")
    rank = config["r"]
    scale = lora_scale(rank, config["lora_alpha"], use_rslora=bool(config.get("use_rslora")))
    experts, fused = {}, set()
    for module, tensors in found.items():
        layer, where = layer_of(module), f"the adapter's experts at '{module}'"
        if layer not in layers:
            raise CheckpointError(f"{where}: the model has none there; take the adapter's own model.")
        if is_fused(tensors):
            fused.add(layer)
        stacked = {key: t.float() for key, t in stack(tensors, num_experts, rank, where).items()}
        order = [(projection, which) for projection in ("gate", "up", "down") for which in "AB"]
        experts[layer] = ExpertLora.of([stacked[key] for key in order], scale)
    return Adapter(scale, experts, _dense(rest), frozenset(fused))


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
    for name, half in halves.items():
        if half.keys() != {"A", "B"}:
            raise CheckpointError(
                f"the adapter has only lora_{min(half)} for '{name}'; give a complete adapter."
            )
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
            if tensor.dtype not in UNQUANTISED or tensor.shape != (len(b), a.shape[1]):
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


def adapt(settings: KTSettings, wrapper: KTMoEWrapper, layer: int, config: Any) -> None:
    """Experts of a loaded `wrapper` compute with the adapter's LoRA from now on, if it has one for them.

    `config`: SGLang's MoeRunnerConfig of the layer.
    """
    adapter, lora = adapter_of(settings), _lora_of(settings, layer)
    if adapter is None or lora is None:
        return
    if rows_in_turn(config) and layer in adapter.fused:
        raise CheckpointError(
            f"the adapter has one LoRA for gate and up of layer {layer}, and this family (gpt-oss) has "
            "their rows in turn; give an adapter with a LoRA for each."
        )
    try:
        attach(wrapper, lora)
    except InputError as error:
        raise CheckpointError(f"{error} Take the adapter's own model.") from error


class DeviceDelta:
    """What a layer's experts on the device get besides while they are loaded: the adapter's LoRA in them.

    Raises FeatureUnavailableError where they are not unquantised.
    """

    def __init__(self, settings: KTSettings, layer: int, *, is_unquantised: bool) -> None:
        self._lora = _lora_of(settings, layer)
        if self._lora is not None and not is_unquantised:
            raise FeatureUnavailableError(
                f"not available yet: --kt-expert-lora-path with quantised experts on the device (layer "
                f"{layer}); leave --kt-num-gpu-experts out, or serve a merged checkpoint of kt sft export."
            )

    def added(self, weight: torch.Tensor, expert: int, shard: str) -> torch.Tensor:
        """`weight` of that expert with it, rounded once; `shard`: SGLang's name of the projection."""
        if self._lora is None:
            return weight
        projection = _PROJECTIONS[shard]
        expected = lora_shape(self._lora, projection)
        if weight.dtype not in UNQUANTISED or weight.shape != expected:
            raise CheckpointError(
                f"{projection} of expert {expert} on the device is {weight.dtype} {list(weight.shape)}, and "
                f"the adapter adds {list(expected)} to it; take the adapter's own model, where it is "
                "unquantised."
            )
        return merged_matrix(weight.cpu(), self._lora, expert, projection).to(weight)

    def refuse_stacked(self, name: str) -> None:
        """Raises FeatureUnavailableError with a LoRA: `name` is of all experts in one tensor."""
        if self._lora is not None:
            raise FeatureUnavailableError(
                f"not available yet: --kt-expert-lora-path with experts on the device that are stored in one "
                f"tensor, '{name}'; leave --kt-num-gpu-experts out."
            )


def forget_adapter() -> None:
    """What was read of it: the layers have it by now."""
    _read.cache_clear()


def _lora_of(settings: KTSettings, layer: int) -> ExpertLora | None:
    adapter = adapter_of(settings)
    return None if adapter is None else adapter.experts.get(layer)


def check_adapter(settings: KTSettings, options: Any) -> None:
    """Raise a KTError for what an adapter cannot be together with; `options`: SGLang's."""
    if settings.adapter is None:
        return
    for is_so, what in (
        (options.pp_size > 1, f"--pp-size {options.pp_size}"),
        (settings.options.hybrid().copies_experts, "options that copy experts to the device"),
        (options.speculative_algorithm is not None, "speculative decoding"),
    ):
        if is_so:
            raise FeatureUnavailableError(
                f"not available yet: --kt-expert-lora-path together with {what}; leave one of them out, or "
                "serve a merged checkpoint of kt sft export."
            )
    adapter_of(settings)
    forget_adapter()  # this process serves no layers
