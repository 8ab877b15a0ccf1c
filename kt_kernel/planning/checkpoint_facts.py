"""A model's facts from the headers of its files: no weight is read.

Reading headers needs torch, whose import takes two seconds, so what was found is kept in the user's cache
under the names, sizes and times of the files, and read from there while these stay the same.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kt_kernel.planning.config_facts import sizes_of_config
from kt_kernel.planning.model_facts import GGUF, SAFETENSORS, ModelFacts
from kt_kernel.user_cache import cache_root

if TYPE_CHECKING:
    from kt_kernel.checkpoint.reader import Checkpoint

logger = logging.getLogger(__name__)

LAYOUT_VERSION = 3  # raise whenever ModelFacts changes
_ENDINGS = (".safetensors", ".json", ".gguf")
_EMBEDDINGS = ("embed_tokens.weight", "word_embeddings.weight", "tok_embeddings.weight", "embed.weight")
_GGUF_EMBEDDING = "token_embd.weight"
# Numbers in one element of a tensor, where codes are packed: 4-bit codes in words or bytes.
_PACKED = {"I32": 8, "U8": 2}


def read_facts(path: Path, weights: Path | None = None) -> ModelFacts:
    """The facts of a checkpoint directory or a GGUF file, kept from the last time or read now.

    `weights`: where the experts are, if not there. Raises a KTError for what cannot be read.
    """
    kept = _kept_file(path, weights or path)
    try:
        return ModelFacts.from_json(json.loads(kept.read_text()))
    except (OSError, ValueError, TypeError, KeyError):
        return _from_headers(path, weights)


def keep_facts(path: Path, facts: ModelFacts, weights: Path | None = None) -> None:
    """For the next `read_facts`; a cache that cannot be written costs the two seconds again."""
    kept = _kept_file(path, weights or path)
    if kept.exists():
        return
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=kept.parent, suffix=".part", delete=False) as part:
            json.dump(facts.to_json(), part, indent=1)
        os.replace(part.name, kept)
    except OSError as error:
        logger.debug("the facts of %s cannot be kept (%s)", path, error)


def _kept_file(path: Path, weights: Path) -> Path:
    state = [LAYOUT_VERSION, importlib.metadata.version("kt-kernel")]
    state += [_state(place) for place in dict.fromkeys((path, weights))]
    name = hashlib.sha256(json.dumps(state).encode()).hexdigest()[:24]
    return cache_root() / "facts" / f"{name}.json"


def _state(path: Path) -> list[Any]:
    entries = sorted(path.iterdir()) if path.is_dir() else [path]
    files = [entry for entry in entries if entry.name.endswith(_ENDINGS) and entry.exists()]
    return [str(path.resolve()), *((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files)]


def _from_headers(path: Path, weights: Path | None) -> ModelFacts:
    from kt_kernel.gguf_model import find_gguf

    facts = _of_gguf(path) if find_gguf(path) is not None else _of_safetensors(path)
    if weights is None or weights.resolve() == path.resolve():
        return facts
    return replace(facts, **_experts_at(weights, facts.sizes.layers))


def _experts_at(path: Path, layers: int) -> dict[str, Any]:
    """Their bytes in the model's own layers, the method that reads them, and whether they have biases."""
    from kt_kernel.checkpoint.sources import open_experts

    source = open_experts(path)
    return {
        "method": source.method(),
        "expert_bytes": sum(size for layer, size in source.layer_bytes().items() if layer < layers),
        "has_biases": source.has_biases(),
    }


def _of_safetensors(path: Path) -> ModelFacts:
    from kt_kernel.checkpoint.reader import open_checkpoint

    checkpoint = open_checkpoint(path)
    sizes = sizes_of_config(checkpoint.config())
    expert_names = {f"{base}.{tail}" for base, tails in checkpoint.expert_groups().items() for tail in tails}
    dense = [name for name in checkpoint.names() if name not in expert_names]
    embedding = [name for name in dense if name.endswith(_EMBEDDINGS)]
    tied = bool(checkpoint.config().get("tie_word_embeddings"))
    read_by_row = [] if tied else embedding
    return ModelFacts(
        sizes=sizes,
        **_experts_at(path, sizes.layers),
        container=SAFETENSORS,
        dense_bytes=_bytes(checkpoint, dense),
        embedding_bytes=_bytes(checkpoint, read_by_row),
        dense_parameters=_parameters(checkpoint, dense),
        embedding_parameters=_parameters(checkpoint, read_by_row),
        dense_format=_commonest(
            (checkpoint.info(n).dtype, _bytes(checkpoint, [n])) for n in dense if n not in embedding
        ),
    )


def _bytes(checkpoint: Checkpoint, names: Iterable[str]) -> int:
    from kt_kernel.checkpoint.sizes import stored_bytes

    return stored_bytes(checkpoint, names)


def _parameters(checkpoint: Checkpoint, names: Iterable[str]) -> int:
    total = 0
    for name in names:
        info, count = checkpoint.info(name), 1
        for extent in info.shape:
            count *= extent
        total += count * (_PACKED.get(info.dtype, 1) if "weight" in name or "blocks" in name else 1)
    return total


def _of_gguf(path: Path) -> ModelFacts:
    from kt_kernel.gguf.model import open_gguf
    from kt_kernel.gguf_model.config import model_config
    from kt_kernel.gguf_model.fields import Fields

    model = open_gguf(path)
    fields = Fields(model)
    sizes = sizes_of_config(model_config(fields))
    dense = {name: info for name, info in model.tensors.items() if "_exps." not in name}
    # A file without one is the server's to refuse.
    embedding = {name: i for name, i in dense.items() if name == _GGUF_EMBEDDING and not fields.is_tied}
    return ModelFacts(
        sizes=sizes,
        **_experts_at(path, sizes.layers),
        container=GGUF,
        dense_bytes=sum(info.bytes for info in dense.values()),
        embedding_bytes=sum(info.bytes for info in embedding.values()),
        dense_parameters=_elements(dense.values()),
        embedding_parameters=_elements(embedding.values()),
        dense_format=_commonest(
            (info.dtype, info.bytes) for name, info in dense.items() if name != _GGUF_EMBEDDING
        ),
    )


def _elements(infos: Iterable[Any]) -> int:
    total = 0
    for info in infos:
        count = 1
        for extent in info.shape:
            count *= extent
        total += count
    return total


def _commonest(stored: Iterable[tuple[str, int]]) -> str:
    """The type that takes the most bytes."""
    counts: Counter[str] = Counter()
    for kind, size in stored:
        counts[kind] += size
    return counts.most_common(1)[0][0] if counts else ""
