"""The tensors of a GGUF file under their published names, decoded one by one.

What the file stores otherwise is undone here: rows of queries and keys in RoPE's pairs, the two halves of
latent attention's kv_b_proj as two tensors, one-row matrices as vectors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from kt_kernel.errors import CheckpointError, FeatureUnavailableError
from kt_kernel.formats.dense_matrix import DenseMatrix
from kt_kernel.gguf.experts import METHOD, GgufExperts
from kt_kernel.gguf.model import GgufModel
from kt_kernel.gguf_model.architectures import (
    WHOLE_MODEL,
    Names,
    RopeRows,
    require_architecture,
)
from kt_kernel.gguf_model.decoding import decode, decode_rows
from kt_kernel.gguf_model.fields import Fields, layer_of
from kt_kernel.gguf_model.stored import block_matrix, is_kept_type

Arrange = Callable[[list[torch.Tensor]], torch.Tensor]

_EXPERTS = re.compile(r"ffn_(gate_up|gate|up|down)(_exps|\.\d+)\.")  # method LLAMAFILE's business
_KV_HALVES = ("attn_k_b.weight", "attn_v_b.weight")
_KV_B = "attn_kv_b.weight"
# Tensors that say again what the metadata say.
_REDUNDANT = ("attn_rot_embd.weight",)


@dataclass(frozen=True)
class DenseTensor:
    """`name`: as published; `parts`: the tensors of the file that it is made from."""

    name: str
    parts: tuple[str, ...]
    arrange: Arrange

    @property
    def has_rows_of_the_file(self) -> bool:
        """Is each of its rows one of the file's, whatever their order?"""
        return self.arrange is _only or isinstance(self.arrange, _HalfSplit)


class DenseWeights:
    """Everything but the routed experts of one model.

    Raises a KTError in one sentence if the architecture is unknown, or a tensor is missing or unknown.
    """

    def __init__(self, file: GgufModel) -> None:
        self.file = file
        self._fields = Fields(file)
        self._architecture = require_architecture(self._fields)
        self.tensors: dict[str, DenseTensor] = {tensor.name: tensor for tensor in self._find()}

    def read(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """One tensor by its published name, in memory of its own; its pages of the file are given back.

        What the file holds in float32 stays so: a model may keep it in more than `dtype`, as DeepSeek-V3's
        biases of experts, whose order bfloat16 would change.
        """
        tensor = self.tensors[name]
        try:
            return tensor.arrange([self._decode(part, dtype) for part in tensor.parts])
        finally:
            self.file.drop_pages(tensor.parts)

    def decoded(self, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        """Published names and tensors, one after the other, in the file's order."""
        for name in self.tensors:
            yield name, self.read(name, dtype)

    def stored(self, name: str) -> DenseMatrix | None:
        """A matrix as the file has it; None if it must be decoded.

        It may be a view of the mapped file, whose pages its `release` gives back.
        """
        tensor = self.tensors[name]
        info = self.file.info(tensor.parts[0])
        if not tensor.has_rows_of_the_file or len(info.shape) != 2 or not is_kept_type(info.type):
            return None
        blocks = tensor.arrange([self.file.view(tensor.parts[0])])
        return block_matrix(name, blocks, info.type, lambda: self.file.drop_pages(tensor.parts))

    def _decode(self, part: str, dtype: torch.dtype) -> torch.Tensor:
        return decode(self.file, part, torch.float32 if self.file.info(part).dtype == "F32" else dtype)

    def decoded_experts(
        self, layer: int, experts: Sequence[int], dtype: torch.dtype
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Some routed experts of a layer, for devices: three matrices each, under published names.

        Raises what method LLAMAFILE does where they are not as the metadata say, and FeatureUnavailableError
        for experts with biases.
        """
        names, fields = self._architecture.experts, self._fields
        sizes = {
            "num_experts": fields.experts,
            "hidden": fields.hidden,
            "intermediate": fields.expert_size,
        }
        with GgufExperts(self.file).layer(layer, METHOD, **sizes) as stored:
            if any(matrix.bias is not None for matrix in stored.all()):
                raise FeatureUnavailableError(
                    f"not available yet: the experts of '{self.file.path}' have biases, and such experts of "
                    "a GGUF file are not put on a device; use no device experts."
                )
            for expert in experts:
                for projection, matrices in (
                    (names.gate, stored.gate),
                    (names.up, stored.up),
                    (names.down, stored.down),
                ):
                    matrix = matrices[expert]
                    name = f"model.layers.{layer}.{names.path}.{expert}.{projection}.weight"
                    yield name, decode_rows(matrix.weight, self.file.info(matrix.name).type, dtype)

    # ---- finding -----------------------------------------------------------------------------------

    def _find(self) -> Iterator[DenseTensor]:
        by_layer: dict[int | None, list[str]] = {}
        for name in self.file.tensors:
            by_layer.setdefault(layer_of(name), []).append(name)
        optional = frozenset({"output"} if self._fields.is_tied else ())
        yield from self._named(by_layer.get(None, []), WHOLE_MODEL, optional, "", "")
        if (
            self._fields.is_tied
        ):  # most of SGLang's models with experts tie nothing, whatever config.json says
            yield DenseTensor("lm_head.weight", ("token_embd.weight",), _only)
        row, moe = self._architecture, set(self._fields.moe_layers)
        for layer in range(self._fields.layers):
            names = row.layer | (row.moe_layer if layer in moe else row.dense_layer)
            published = f"model.layers.{layer}."
            tensors = by_layer.get(layer, [])
            yield from self._named(tensors, names, row.optional, f"blk.{layer}.", published)

    def _named(
        self, tensors: list[str], names: Names, optional: frozenset[str], prefix: str, published: str
    ) -> Iterator[DenseTensor]:
        """The tensors of one layer, or of none, whose names in the file begin with `prefix`."""
        missing = {stem for stem in names if stem not in optional}
        halves = [prefix + half for half in _KV_HALVES]
        if self._halves_of_kv_b(prefix):
            missing.discard("attn_kv_b")
            name = f"{published}{names['attn_kv_b']}.weight"
            yield DenseTensor(name, tuple(halves), _join_kv_b)
        for tensor in tensors:
            tail = tensor.removeprefix(prefix)
            stem, _, suffix = tail.rpartition(".")
            if _EXPERTS.match(tail) or tail in _REDUNDANT or (tensor in halves and "attn_kv_b" in names):
                continue
            if tail in names:  # a name for one tensor alone
                missing.discard(tail)
                yield DenseTensor(published + names[tail], (tensor,), _only)
            elif stem in names and suffix in ("weight", "bias"):
                missing.discard(stem)
                yield DenseTensor(f"{published}{names[stem]}.{suffix}", (tensor,), self._arrangement(tail))
            else:
                raise self._unknown(tensor)
        if missing:
            raise CheckpointError(
                f"'{self.file.path}' has no tensor '{prefix}{min(missing)}', which a model of the "
                f"architecture {self._architecture.name} needs; download it again."
            )

    def _halves_of_kv_b(self, prefix: str) -> bool:
        """Is kv_b_proj stored as two tensors only? Some files have it both ways."""
        return prefix + _KV_B not in self.file.tensors and all(
            prefix + half in self.file.tensors for half in _KV_HALVES
        )

    def _arrangement(self, tail: str) -> Arrange:
        if self._architecture.rope_rows is RopeRows.PAIRS:
            if tail.startswith("attn_q."):
                return _HalfSplit(self._fields.heads)
            if tail.startswith("attn_k."):
                return _HalfSplit(self._fields.kv_heads)
        return _as_row if tail == "ffn_gate_inp_shexp.weight" else _only

    def _unknown(self, tensor: str) -> CheckpointError:
        return CheckpointError(
            f"'{self.file.path}' has a tensor '{tensor}', which is no part of a model of the architecture "
            f"{self._architecture.name} that is known here; give --model-path the directory of the original "
            "model, and the file as --kt-weight-path."
        )


def half_split_rows(pairs: torch.Tensor, heads: int) -> torch.Tensor:
    """RoPE's rows in pairs, [heads * d] or [heads * d, columns], in the published order of halves."""
    size = pairs.shape[0] // heads
    return pairs.reshape(heads, size // 2, 2, -1).transpose(1, 2).reshape(pairs.shape).contiguous()


@dataclass(frozen=True)
class _HalfSplit:
    heads: int

    def __call__(self, parts: list[torch.Tensor]) -> torch.Tensor:
        return half_split_rows(parts[0], self.heads)


def _only(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0]


def _as_row(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0].reshape(1, -1)


def _join_kv_b(parts: list[torch.Tensor]) -> torch.Tensor:
    """attn_k_b [heads, rank, d_nope] and attn_v_b [heads, d_v, rank] -> kv_b_proj [heads * (d_nope + d_v),
    rank]."""
    keys, values = parts
    return torch.cat([keys.transpose(1, 2), values], dim=1).flatten(0, 1).contiguous()
