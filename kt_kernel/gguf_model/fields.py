"""What a GGUF file says of its model: metadata of its architecture, and what the tensors' shapes tell."""

from __future__ import annotations

import functools
import re
from typing import Any

from kt_kernel.errors import CheckpointError
from kt_kernel.gguf.model import GgufModel

_LAYER = re.compile(r"blk\.(\d+)\.")
# All experts of a layer in one tensor; in old files, each in one of its own.
_STACKED, _FIRST = "blk.{}.ffn_down_exps.weight", "blk.{}.ffn_down.0.weight"
_YARN = {"beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow", "attention_factor": "yarn_attn_factor"}


def number(stored: float) -> float:
    """A float32 of the metadata as the number that was meant: six digits bring back 1e-06 and 2.827."""
    return float(f"{stored:.6g}")


class Fields:
    """`file` in the terms of the published model's configuration.

    Every property raises CheckpointError with one sentence where the file does not say what is asked.
    """

    def __init__(self, file: GgufModel) -> None:
        self.file = file

    def get(self, key: str, default: Any = None) -> Any:
        """The metadata `<architecture>.<key>`."""
        return self.file.metadata.get(f"{self.file.architecture}.{key}", default)

    def integer(self, key: str, default: int | None = None) -> int:
        """A metadata value that must be one integer; without a default it must be there."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise CheckpointError(
                f"'{self.file.path}' has {self.file.architecture}.{key} = {_shown(value)}, expected one "
                "integer; take a file of a model whose layers are all alike."
            )
        return value

    def real(self, key: str, default: float | None = None) -> float:
        """A metadata value that must be a number; without a default it must be there."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise CheckpointError(
                f"'{self.file.path}' has {self.file.architecture}.{key} = {_shown(value)}, expected a "
                "number; download it again."
            )
        return number(value)

    def shape(self, tensor: str) -> tuple[int, ...]:
        """The shape of a tensor, rows first; raises CheckpointError if the file has no such tensor."""
        if tensor not in self.file.tensors:
            raise CheckpointError(f"'{self.file.path}' has no tensor '{tensor}'; download it again.")
        return tuple(self.file.tensors[tensor].shape)

    # ---- the model --------------------------------------------------------------------------------

    @property
    def layers(self) -> int:
        """Decoder layers, without those for speculative decoding that may follow them."""
        return self.integer("block_count") - self.integer("nextn_predict_layers", 0)

    @property
    def vocabulary(self) -> int:
        return self.shape("token_embd.weight")[0]

    @property
    def hidden(self) -> int:
        return self.integer("embedding_length")

    @property
    def heads(self) -> int:
        return self.integer("attention.head_count")

    @property
    def kv_heads(self) -> int:
        return self.integer("attention.head_count_kv", self.heads)

    @property
    def head_dim(self) -> int:
        return self.integer("attention.key_length", self.hidden // self.heads)

    @property
    def is_tied(self) -> bool:
        """Does the embedding serve as the output head, too?"""
        return "output.weight" not in self.file.tensors

    def has(self, tensor: str) -> bool:
        """Is there a tensor of this name, without its number, in any of the model's layers?"""
        return any(f"blk.{layer}.{tensor}" in self.file.tensors for layer in range(self.layers))

    # ---- experts ----------------------------------------------------------------------------------

    @functools.cached_property
    def moe_layers(self) -> tuple[int, ...]:
        """The layers with routed experts; there is at least one."""
        found = [
            layer
            for layer in range(self.layers)
            if any(name.format(layer) in self.file.tensors for name in (_STACKED, _FIRST))
        ]
        if not found:
            raise CheckpointError(
                f"'{self.file.path}' ({self.file.architecture}) has no experts in it: kt-kernel serves "
                "mixture-of-experts models."
            )
        return tuple(found)

    @property
    def leading_dense_layers(self) -> int:
        """How many dense layers come before those with experts; raises if any comes later."""
        first = self.moe_layers[0]
        if self.moe_layers != tuple(range(first, self.layers)):
            raise CheckpointError(
                f"'{self.file.path}' has experts in the layers {list(self.moe_layers)} of {self.layers}, "
                "expected only the first ones to be without; download it again."
            )
        return first

    @property
    def experts(self) -> int:
        told, stacked = self.integer("expert_count"), _STACKED.format(self.moe_layers[0])
        if stacked in self.file.tensors and (stored := self.shape(stacked)[0]) != told:
            raise CheckpointError(
                f"'{self.file.path}' says it has {told} experts, but its tensors hold {stored}; download it "
                "again."
            )
        return told

    @property
    def experts_per_token(self) -> int:
        return self.integer("expert_used_count")

    @property
    def expert_size(self) -> int:
        """Neurons of one routed expert."""
        layer = self.moe_layers[0]
        stacked = _STACKED.format(layer)
        return self.shape(stacked if stacked in self.file.tensors else _FIRST.format(layer))[-1]

    @property
    def shared_expert_size(self) -> int:
        """Neurons of all shared experts together; 0 = there are none."""
        name = f"blk.{self.moe_layers[0]}.ffn_down_shexp.weight"
        return self.shape(name)[1] if name in self.file.tensors else 0

    # ---- positions --------------------------------------------------------------------------------

    @property
    def rope(self) -> dict[str, Any]:
        """`rope_parameters` of config.json."""
        kind = self.get("rope.scaling.type", "none")
        plain = {"rope_type": "default", "rope_theta": self.real("rope.freq_base", 10000.0)}
        if kind == "none" or self.get("rope.scaling.factor") is None:
            return plain
        scaled = {**plain, "rope_type": kind, "factor": self.real("rope.scaling.factor")}
        if kind == "yarn":
            said = {ours: f"rope.scaling.{theirs}" for ours, theirs in _YARN.items()}
            scaled |= {ours: self.real(key) for ours, key in said.items() if self.get(key) is not None}
            original = self.integer("rope.scaling.original_context_length")
            return {**scaled, "original_max_position_embeddings": original}
        if kind == "linear":
            return scaled
        raise CheckpointError(
            f"'{self.file.path}' scales its positions by {kind!r}, which is not available yet; known are "
            "none, linear and yarn."
        )


def layer_of(tensor: str) -> int | None:
    """The layer that a tensor's name begins with; None = it belongs to none."""
    found = _LAYER.match(tensor)
    return int(found[1]) if found else None


def _shown(value: Any) -> str:
    return "nothing" if value is None else repr(value)[:60]
