"""LoraExperts: PEFT's layer of LoRA on the experts of a layer, for `LoraConfig._register_custom_module`.

Parameters are float32 on the CPU, whatever the model's dtype and device: they are the optimiser's masters,
and what the kernels read.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from kt_kernel.adapters import layout as adapter_layout
from kt_kernel.adapters.backend import Dropout, ExpertLora
from kt_kernel.adapters.layout import PROJECTIONS
from kt_kernel.adapters.limits import VARIANTS, first_set
from kt_kernel.checkpoint.families import GateUpRows
from kt_kernel.errors import CheckpointError, ConfigurationError, FeatureUnavailableError
from kt_kernel.training.experts import LOAD_IT_OTHERWISE, TrainableExperts

_NO_MODULE = nn.Module()
# Of an adapter that the module does not have.
_OF_OTHERS = re.compile(r"\d+\.\w+\.lora_[AB]\.\w+\.weight")


class ExpertMatrices(nn.Module):
    """A or B of the three projections of all experts: `gate`, `up`, `down`, each [E, rows, columns]."""

    def __init__(self, **shapes: tuple[int, int, int]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape, dtype=torch.float32, device="cpu")))

    def _apply(self, fn: Callable, recurse: bool = True) -> ExpertMatrices:  # noqa: FBT001, FBT002
        """Nothing: they stay float32 on the CPU when the model moves or changes its dtype."""
        return self


class LoraExperts(nn.Module, LoraLayer):
    """A `TrainableExperts` with LoRA on gate, up and down of every expert, all of one rank."""

    adapter_layer_names = ("lora_A", "lora_B")

    def __init__(
        self,
        base_layer: TrainableExperts,
        adapter_name: str,
        config: LoraConfig,
        r: int,
        lora_alpha: float,
        **options: Any,
    ) -> None:
        super().__init__()
        if base_layer.matrices() is not None:
            raise FeatureUnavailableError(
                "the model was loaded with train_experts='full', where experts have no LoRA; load it with "
                "train_experts='lora', or leave the experts out of the adapter (experts=False)."
            )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Unsupported layer type")
            LoraLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self.register_state_dict_post_hook(_to_files)
        self.register_load_state_dict_pre_hook(_from_files)
        self.update_layer(adapter_name, r, lora_alpha, config)

    def update_layer(
        self, adapter_name: str, r: int, lora_alpha: float, config: LoraConfig, **options: Any
    ) -> None:
        """Add an adapter. Raises FeatureUnavailableError for PEFT's variants of LoRA."""
        _refuse_variants(config)
        if r <= 0:
            raise ConfigurationError(f"r is {r}, expected a positive number.")
        config.names = self.base_layer.names  # for the files
        backend = self.base_layer.backend
        e, h, i = backend.num_experts, backend.hidden_size, backend.intermediate_size
        self.r[adapter_name], self.lora_alpha[adapter_name] = r, lora_alpha
        self.scaling[adapter_name] = adapter_layout.lora_scale(r, lora_alpha, use_rslora=config.use_rslora)
        dropout = config.lora_dropout
        self.lora_dropout[adapter_name] = nn.Dropout(dropout) if dropout else nn.Identity()
        self.lora_A[adapter_name] = ExpertMatrices(gate=(e, r, h), up=(e, r, h), down=(e, r, i))
        self.lora_B[adapter_name] = ExpertMatrices(gate=(e, i, r), up=(e, i, r), down=(e, h, r))
        self.use_dora[adapter_name] = False
        self.lora_bias[adapter_name] = False
        self.reset_lora_parameters(adapter_name, config.init_lora_weights)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @torch.no_grad()
    def reset_lora_parameters(self, adapter_name: str, init_lora_weights: bool | str) -> None:  # noqa: FBT001
        """A as PEFT fills it for each expert apart, B zero; False: B is not zero either, for tests."""
        for matrix in self.lora_A[adapter_name].parameters():
            if init_lora_weights == "gaussian":
                matrix.normal_(std=1 / self.r[adapter_name])
            else:  # kaiming_uniform_ with a = sqrt(5), of one expert's [r, in]
                bound = 1 / math.sqrt(matrix.shape[2])
                matrix.uniform_(-bound, bound)
        for matrix in self.lora_B[adapter_name].parameters():
            if init_lora_weights is False:
                bound = 1 / math.sqrt(matrix.shape[2])
                matrix.uniform_(-bound, bound)
            else:
                matrix.zero_()

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        adapter_names: list[str] | None = None,
    ) -> torch.Tensor:
        """As `TrainableExperts.forward`, with the LoRA of the active adapters."""
        if adapter_names is not None:
            raise FeatureUnavailableError(
                "adapter_names was given, but the experts have one adapter for all tokens; use set_adapter."
            )
        active = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or not active:
            return self.base_layer.run(hidden_states, top_k_index, top_k_weights)
        lora = self._lora(active)
        dropout = self._dropout(active, top_k_index.numel())
        return self.base_layer.run(hidden_states, top_k_index, top_k_weights, lora, dropout)

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """With a name for each expert: PEFT looks under the children of its layers for what to save."""
        yield from super().named_children()
        for expert in range(self.base_layer.backend.num_experts):
            yield str(expert), _NO_MODULE

    def __getattr__(self, name: str) -> Any:
        """See `named_children`."""
        return _NO_MODULE if name.isdigit() else super().__getattr__(name)

    def expert_lora(self, adapter_name: str) -> ExpertLora:
        """The six parameters of an adapter, and its scale."""
        a, b = self.lora_A[adapter_name], self.lora_B[adapter_name]
        return ExpertLora(a.gate, b.gate, a.up, b.up, a.down, b.down, scale=self.scaling[adapter_name])

    def merge(self, *arguments: Any, **options: Any) -> None:
        """Raises FeatureUnavailableError: packed experts cannot take a LoRA in."""
        raise FeatureUnavailableError(
            "the experts are packed and cannot take the adapter in; write a merged checkpoint instead, with "
            "kt_kernel.training.merge or kt sft export RUN.yaml --to FOLDER. PEFT may have merged other "
            "layers before it came to these: load the model again."
        )

    def _move_adapter_to_device_of_base_layer(self, *arguments: Any, **options: Any) -> None:
        """Nothing: see ExpertMatrices."""

    def _lora(self, active: list[str]) -> ExpertLora:
        """Of several adapters, one whose rank is the sum of theirs."""
        loras = [self.expert_lora(name) for name in active]
        if len(loras) == 1:
            return loras[0]
        tensors = []
        for place in range(0, 6, 2):
            tensors.append(torch.cat([lora.tensors[place] for lora in loras], 1))
            tensors.append(torch.cat([lora.tensors[place + 1] * lora.scale for lora in loras], 2))
        return ExpertLora.of(tensors, 1.0)

    def _dropout(self, active: list[str], pairs: int) -> Dropout | None:
        """Masks from torch's generator, so that a checkpoint that is run again draws the same."""
        layers = [self.lora_dropout[name] for name in active]
        p = next((layer.p for layer in layers if isinstance(layer, nn.Dropout) and layer.training), 0.0)
        if not p:
            return None
        if len(active) > 1:
            raise FeatureUnavailableError(
                f"the adapters {', '.join(active)} are active together, and at least one has dropout, which "
                "is available for one adapter at a time; set lora_dropout to 0."
            )
        backend = self.base_layer.backend
        widths = (backend.hidden_size, backend.hidden_size, backend.intermediate_size)
        masks = [torch.empty(pairs, width, dtype=torch.bool).bernoulli_(1 - p) for width in widths]
        return Dropout.of(masks, 1 / (1 - p))


def _refuse_variants(config: LoraConfig) -> None:
    name = first_set(config, VARIANTS)
    if name is not None:
        raise FeatureUnavailableError(
            f"{name} is set, but the experts have plain LoRA only; leave it out, or the experts."
        )
    if config.init_lora_weights not in (True, False, "gaussian"):
        raise FeatureUnavailableError(
            f"init_lora_weights is {config.init_lora_weights!r}, but the LoRA of experts starts as True or "
            "'gaussian' say; use one of these, or leave the experts out."
        )


def _parts(module: LoraExperts, prefix: str) -> dict[str, dict[tuple[str, str], str]]:
    """adapter -> (projection, "A" or "B") -> the name of that parameter in a state dict."""
    return {
        adapter: {
            (projection, which): f"{prefix}lora_{which}.{adapter}.{projection}"
            for projection in PROJECTIONS
            for which in "AB"
        }
        for adapter in module.lora_A
    }


def _to_files(module: LoraExperts, state: dict, prefix: str, metadata: dict) -> None:
    """After state_dict: names as in adapter files."""
    for adapter, parts in _parts(module, prefix).items():
        stacked = {key: state.pop(name) for key, name in parts.items() if name in state}
        for name, tensor in adapter_layout.per_expert(stacked, module.base_layer.names).items():
            state[_with_adapter(prefix + name, adapter)] = tensor


def _from_files(module: LoraExperts, state: dict, prefix: str, *rest: Any) -> None:
    """Before load_state_dict: the names of the parameters. Of an adapter that is not in `state`, nothing."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key in [key for key in state if key.startswith(prefix)]:
        adapter, name = _split(key.removeprefix(prefix), module)
        if _OF_OTHERS.fullmatch(name):
            raise CheckpointError(LOAD_IT_OTHERWISE.format(where=prefix.removesuffix(".")))
        if adapter_layout.is_expert_tensor(name):
            found.setdefault(adapter, {})[name] = state.pop(key)
    experts = module.base_layer.backend.num_experts
    for adapter, tensors in found.items():
        where = f"adapter '{adapter}', {prefix.removesuffix('.')}"
        if module.base_layer.rows is GateUpRows.ALTERNATING:
            adapter_layout.refuse_fused(tensors, where)
        parts = _parts(module, prefix)[adapter]
        for key, tensor in adapter_layout.stack(tensors, experts, module.r[adapter], where).items():
            state[parts[key]] = tensor.float()


def _split(name: str, module: LoraExperts) -> tuple[str, str]:
    """The adapter of a tensor, and its name in files.

    What PEFT has converted from single experts to its own layout has lost its adapter: it is the only one.
    """
    adapter = next((each for each in module.lora_A if name.endswith(f".{each}.weight")), None)
    if adapter is not None:
        return adapter, f"{name.removesuffix(f'.{adapter}.weight')}.weight"
    if len(module.lora_A) > 1 and adapter_layout.is_expert_tensor(name):
        raise CheckpointError(
            f"'{name}' is of one of the adapters {', '.join(module.lora_A)}, without saying of which; load "
            "adapters with kt_kernel.training.load_adapter."
        )
    return next(iter(module.lora_A)), name


def _with_adapter(name: str, adapter: str) -> str:
    return f"{name.removesuffix('.weight')}.{adapter}.weight"
