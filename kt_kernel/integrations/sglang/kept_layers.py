"""Dense layers that stay in their checkpoint's format.

SGLang makes the model and finds the layer of each tensor; the stream of tensors has `StoredWeight`s in place
of quantised matrices (dense_weights.py, model_file.py). A layer that gets such rows is packed by the
extension as it is, and the memory of its weight, which nobody has written into, is never used. Afterwards it
is like any layer that SGLang has had packed on a CPU. Every other layer loads as always: its loader decodes
what it is given.
"""

from __future__ import annotations

import logging
import re
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.layers.linear import LinearBase, QKVParallelLinear
from sglang.srt.layers.quantization.base_config import LinearMethodBase
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead
from sglang.srt.runtime_context import get_parallel, get_server_args

from kt_kernel.formats.dense_matrix import DenseMatrix, plain_matrix
from kt_kernel.integrations.sglang.stored_weight import StoredWeight

logger = logging.getLogger(__name__)

# Layers whose weight SGLang's models read themselves: the halves of latent attention's kv_b_proj, routers,
# the gate of a shared expert, convolutions.
_READ_BY_MODELS = re.compile(r"(?:^|\.)(?:kv_b_proj|gate|shared_expert_gate|router|conv1d)$")

# Types in which the kernels' results lose nothing; float32 is asked for by those who want more.
_DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Packed:
    """`weight`: for SGLang's operators on packed weights; `bytes`: what it takes; `formats`: of its rows."""

    weight: torch.Tensor
    bytes: int
    formats: tuple[str, ...]


# Matrices one below the other, and a tensor with the shape and type that the weight would have. Raises
# ValueError for matrices that cannot be packed.
Pack = Callable[[list[DenseMatrix], torch.Tensor], Packed]


class KeptMethod(LinearMethodBase):
    """In place of the method of one layer while it is loaded: takes its rows as they come."""

    def __init__(self, name: str, layer: torch.nn.Module, pack: Pack) -> None:
        self.name = name
        self.rows, self.columns = _shape(layer)
        self.packed: Packed | None = None
        self._original_method = layer.quant_method
        self._load_decoded = layer.weight.weight_loader
        self._pack = pack
        self._waiting: dict[int, tuple[StoredWeight, tuple, dict]] = {}  # by first row
        self._lock = threading.Lock()  # some models load with several threads

    def create_weights(self, layer: torch.nn.Module, *sizes: Any, **attributes: Any) -> None:
        """The layer has its parameters when it gets this method."""

    def loader_of(self, layer: torch.nn.Module) -> Callable:
        """The `weight_loader` of the layer's weight."""

        def load(parameter: torch.nn.Parameter, weight: torch.Tensor, *shard: Any, **named: Any) -> None:
            first_row = _first_row(layer, *shard, **named) if isinstance(weight, StoredWeight) else None
            if first_row is None or weight.shape[1] != self.columns:
                self._load_decoded(parameter, weight, *shard, **named)
                return
            with self._lock:
                self._waiting[first_row] = (weight, shard, named)
                if sum(part.shape[0] for part, _, _ in self._waiting.values()) == self.rows:
                    self._keep(layer)

        return load

    def _keep(self, layer: torch.nn.Module) -> None:
        """Packs what waits, and between it what the layer was given as numbers."""
        matrices, end = [], 0
        for first, (part, _, _) in sorted(self._waiting.items()):
            matrices += self._loaded(layer, end, first)
            matrices += part.matrices
            end = first + part.shape[0]
        matrices += self._loaded(layer, end, self.rows)
        try:
            self.packed = self._pack(matrices, layer.weight.data[: self.rows])
        except ValueError as error:
            logger.debug("%s is decoded: %s", self.name, error)
            return
        self._waiting.clear()
        for matrix in matrices:
            matrix.release()

    def _loaded(self, layer: torch.nn.Module, begin: int, end: int) -> list[DenseMatrix]:
        if begin == end:
            return []
        return [plain_matrix(f"{self.name}[{begin}:{end}]", layer.weight.data[begin:end])]

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Gives the layer its method back, and the packed weight if there is one."""
        layer.weight.weight_loader = self._load_decoded
        layer.quant_method = self._original_method
        if self._waiting and layer.weight.dtype is torch.bfloat16:
            self._keep(layer)
        if self.packed is None:
            for weight, shard, named in self._waiting.values():
                self._load_decoded(layer.weight, weight, *shard, **named)
            self._waiting.clear()
            self._original_method.process_weights_after_loading(layer)
            return
        packed = torch.nn.Parameter(self.packed.weight, requires_grad=False)
        packed.__dict__ = layer.weight.__dict__
        layer.weight = packed
        layer.use_intel_amx_backend = True
        if getattr(layer, "bias", None) is not None:
            layer.bias = torch.nn.Parameter(layer.bias.data.float(), requires_grad=False)

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        raise NotImplementedError(f"{self.name} computes before it is loaded.")


_models: dict[bool, KeptLayers] = {}  # by: is it a draft model?


def keep_layers(model: torch.nn.Module, model_config: Any, pack: Pack) -> bool:
    """Prepare the layers of a model that is about to be loaded, so that StoredWeights stay what they are.

    False: they would all be decoded, for the model computes in float32 or on several ranks.
    """
    if model_config.dtype not in _DTYPES or get_parallel().tp_size > 1:
        return False
    shared = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    methods = []
    for name, layer in model.named_modules():
        if _can_be_kept(name, layer) and shared[id(layer.weight)] == 1:
            method = KeptMethod(name, layer, pack)
            layer.weight.weight_loader = method.loader_of(layer)
            layer.quant_method = method
            methods.append(method)
    _models[model_config.is_draft_model] = KeptLayers(methods)
    return True


def kept_layers(*, of_draft_model: bool) -> KeptLayers | None:
    """Of the model that this process serves, or of its draft model; None before it is loaded."""
    return _models.get(of_draft_model)


class KeptLayers:
    """Those of one model that may be kept."""

    def __init__(self, methods: list[KeptMethod]) -> None:
        self._methods = methods

    def formats(self) -> dict[str, tuple[str, ...]]:
        """Layer -> the formats of its rows, of those that are kept."""
        return {method.name: method.packed.formats for method in self._methods if method.packed is not None}

    def report(self) -> dict[str, Any]:
        """How many `layers` stay in the `formats` of their checkpoint, what they take (`bytes`), and what
        they would take decoded to 16 bits (`decoded_bytes`)."""
        kept = [method for method in self._methods if method.packed is not None]
        return {
            "layers": len(kept),
            "formats": dict(Counter(name for method in kept for name in method.packed.formats)),
            "bytes": sum(method.packed.bytes for method in kept),
            "decoded_bytes": sum(2 * method.rows * method.columns for method in kept),
        }


def _can_be_kept(name: str, layer: torch.nn.Module) -> bool:
    if _READ_BY_MODELS.search(name) or getattr(layer, "weight", None) is None:
        return False
    is_linear = isinstance(layer, LinearBase) and type(layer.quant_method) is UnquantizedLinearMethod
    # A draft model may take the head of its model as its own.
    is_head = isinstance(layer, ParallelLMHead) and get_server_args().speculative_algorithm is None
    return (is_linear or is_head) and layer.weight.dim() == 2 and hasattr(layer.weight, "weight_loader")


def _shape(layer: torch.nn.Module) -> tuple[int, int]:
    """Rows and columns that a checkpoint has of the layer: heads are padded."""
    rows = layer.org_vocab_size if isinstance(layer, ParallelLMHead) else layer.weight.shape[0]
    return rows, layer.weight.shape[1]


def _first_row(layer: torch.nn.Module, loaded_shard_id: Any = None) -> int | None:
    """Of a part of a fused layer; None for parts that are not known here."""
    if loaded_shard_id is None:
        return 0
    if isinstance(layer, QKVParallelLinear):
        return layer._get_shard_offset_mapping(loaded_shard_id)
    sizes = getattr(layer, "output_sizes", None)
    return sum(sizes[:loaded_shard_id]) if sizes and isinstance(loaded_shard_id, int) else None
