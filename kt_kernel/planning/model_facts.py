"""What a plan must know of a model; read from headers (checkpoint_facts.py) or from the registry."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from kt_kernel.kv_budget import StateValues

# Attention kinds: what the KV cache holds.
GQA, MLA, LINEAR = "GQA", "MLA", "linear"
SAFETENSORS, GGUF, REGISTRY = "safetensors", "GGUF", "registry"


@dataclass(frozen=True)
class Sizes:
    """What a configuration says. `family`: its model_type; `architecture`: SGLang's class of the model.

    `attention`: GQA, MLA, or "linear" where some layers keep a state instead of a cache. `intermediate`: of
    one expert. `kv_values_per_token`: numbers in the KV cache for one token, in all layers;
    `states`: those that a request keeps in layers of linear attention.
    """

    family: str
    architecture: str
    attention: str
    layers: int
    moe_layers: int
    experts: int
    top_k: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    context: int
    kv_values_per_token: int
    states: StateValues

    @property
    def expert_parameters(self) -> int:
        """Of one routed expert."""
        return 3 * self.hidden * self.intermediate


@dataclass(frozen=True)
class ModelFacts:
    """Bytes are those of the files. `expert_bytes`: all routed experts of the model's own layers;
    `dense_bytes`: everything else, of which `embedding_bytes` are read row by row.

    `method`: which reads the experts; `dense_format`: what most dense weights are stored as, "BF16";
    `dense_parameters`: their number; `container`: "safetensors", "GGUF" or "registry" (nothing was read);
    `has_biases`: experts have some, hence are not copied to a GPU while serving.
    """

    sizes: Sizes
    method: str
    container: str
    expert_bytes: int
    dense_bytes: int
    embedding_bytes: int
    dense_parameters: int
    embedding_parameters: int
    dense_format: str
    has_biases: bool = False

    @property
    def total_bytes(self) -> int:
        """Of all weights as stored."""
        return self.expert_bytes + self.dense_bytes

    @property
    def bytes_per_expert(self) -> float:
        return self.expert_bytes / (self.sizes.moe_layers * self.sizes.experts)

    @property
    def bytes_per_layer(self) -> float:
        """Of one layer's routed experts."""
        return self.expert_bytes / self.sizes.moe_layers

    @property
    def active_expert_parameters(self) -> int:
        """Of the routed experts that one token uses."""
        return self.sizes.moe_layers * self.sizes.top_k * self.sizes.expert_parameters

    @property
    def read_dense_parameters(self) -> int:
        """Dense weights that every token reads: all but the embedding."""
        return self.dense_parameters - self.embedding_parameters

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> ModelFacts:
        """Raises TypeError or KeyError for what `to_json` did not write."""
        sizes = content["sizes"]
        sizes = Sizes(**{**sizes, "states": StateValues(**sizes["states"])})
        return cls(**{**content, "sizes": sizes})
