"""How many bytes the weights outside the experts take once they are loaded."""

from __future__ import annotations

from dataclasses import dataclass

from kt_kernel.planning.model_facts import GGUF, ModelFacts
from kt_kernel.planning.user_options import UserOptions

_ELEMENT = {"float32": 4, "float": 4}
_EXACT_16 = 2


@dataclass(frozen=True)
class DenseStorage:
    """Bytes of all ranks together. `read`: what one token reads of them; `format`: the method whose kernels
    read them, or "float32".
    """

    total: float
    read: float
    format: str


# Types in files -> the method whose kernels multiply matrices of that type.
_METHOD_OF = {"BF16": "BF16", "F16": "BF16", "F32": "BF16", "F8_E4M3": "FP8", "I32": "RAWINT4", "U8": "MXFP4"}


def on_cpu(facts: ModelFacts, options: UserOptions, dtype: str | None) -> DenseStorage:
    """In main memory. Kept as stored where our operators compute in 16 bits on one rank (doc/serving.md),
    the embedding decoded; else everything is decoded to `dtype`.
    """
    width = _ELEMENT.get(options.text("--dtype") or dtype or "", _EXACT_16)
    decoded = width * facts.dense_parameters
    ranks = options.integer("--tp-size") or 1
    if width != _EXACT_16:
        return DenseStorage(decoded, width * facts.read_dense_parameters, "float32")
    if ranks > 1 or options.text("--kt-cpu-operators") == "off":
        return DenseStorage(decoded, width * facts.read_dense_parameters, "BF16")
    read = min(width * facts.read_dense_parameters, facts.dense_bytes - facts.embedding_bytes)
    method = _METHOD_OF.get(facts.dense_format, "LLAMAFILE" if facts.container == GGUF else "BF16")
    return DenseStorage(read + width * facts.embedding_parameters, read, method)


def on_gpu(facts: ModelFacts) -> DenseStorage:
    """In the memory of GPUs: as stored, but a GGUF file's are decoded to 16 bits."""
    if facts.container == GGUF:
        return DenseStorage(2 * facts.dense_parameters, 2 * facts.read_dense_parameters, "BF16")
    read = facts.dense_bytes - facts.embedding_bytes
    return DenseStorage(facts.dense_bytes, read, _METHOD_OF.get(facts.dense_format, "BF16"))
