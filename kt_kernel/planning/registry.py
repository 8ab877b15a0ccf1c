"""Models by name: facts of published models, the server's parsers and flags for them.

`models.yaml` beside this file, then the user's `models.yaml` in their folder of settings (models_dir.py): an
entry of theirs replaces single fields of ours, or adds a model. Every field is optional but `config`, which
holds keys of the model's config.json. What could not be checked against the hub carries `verified: false`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from kt_kernel.errors import ConfigurationError
from kt_kernel.planning.config_facts import sizes_of_config, text_config
from kt_kernel.planning.model_facts import MLA, REGISTRY, ModelFacts, Sizes
from kt_kernel.planning.models_dir import config_root

SHIPPED = Path(__file__).with_name("models.yaml")

# Bits of a weight with its scales, by method, as published checkpoints store experts.
_BITS = {
    "BF16": 16,
    "FP8": 8.002,
    "FP8_PERCHANNEL": 8.02,
    "MXFP8": 8.25,
    "RAWINT4": 4.5,
    "GPTQ_INT4": 4.16,
    "MXFP4": 4.25,
    "NVFP4": 4.5,
}
_DENSE_BITS = {"BF16": 16, "FP8": 8.002, "MXFP8": 8.25}
_WITH_EXPERT_BIASES = ("gpt_oss",)
# Dense types as headers of files call them.
_DENSE_FORMAT = {"BF16": "BF16", "FP8": "F8_E4M3", "MXFP8": "F8_E4M3"}


@dataclass(frozen=True)
class Entry:
    """`hub`: ids under which it was published; `aliases`: further names for `kt run`. `method`: of the
    experts; `dense`: BF16 or FP8, of the rest. `parameters`, `active_parameters`: in total, and for a token.
    """

    name: str
    config: Mapping[str, Any]
    hub: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    method: str = "BF16"
    dense: str = "BF16"
    parameters: float | None = None
    active_parameters: float | None = None
    size_bytes: float | None = None
    tool_call_parser: str | None = None
    reasoning_parser: str | None = None
    flags: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    verified: bool = False
    source: str = field(default="", compare=False)

    @property
    def names(self) -> tuple[str, ...]:
        """All that it answers to."""
        return (self.name, *self.aliases, *self.hub)

    def is_as_large(self, sizes: Sizes) -> bool:
        """Has a checkpoint of these sizes this model's layers?"""
        text = text_config(self.config)
        return (text.get("num_hidden_layers"), text.get("hidden_size")) == (sizes.layers, sizes.hidden)

    def sizes(self) -> Sizes:
        """Raises ConfigurationError if `config` does not say enough for a plan."""
        return sizes_of_config(self.config)

    def facts(self) -> ModelFacts:
        """What a plan needs, from the numbers here alone; raises as `sizes` does."""
        sizes = self.sizes()
        expert_parameters = sizes.moe_layers * sizes.experts * sizes.expert_parameters
        embedding = sizes.vocabulary * sizes.hidden
        dense = max((self.parameters or 0) - expert_parameters, _attention_parameters(sizes) + 2 * embedding)
        return ModelFacts(
            sizes=sizes,
            method=self.method,
            container=REGISTRY,
            expert_bytes=int(expert_parameters * _BITS[self.method] / 8),
            dense_bytes=int((dense - 2 * embedding) * _DENSE_BITS[self.dense] / 8 + 4 * embedding),
            embedding_bytes=2 * embedding,
            dense_parameters=int(dense),
            embedding_parameters=embedding,
            dense_format=_DENSE_FORMAT[self.dense],
            has_biases=sizes.family in _WITH_EXPERT_BIASES,
        )


def _attention_parameters(sizes: Sizes) -> int:
    """At least so many, where the total is not known."""
    kv = sizes.heads if sizes.attention == MLA else sizes.kv_heads
    return sizes.layers * 2 * sizes.hidden * sizes.head_dim * (sizes.heads + kv)


class Registry:
    """Entries by name, whatever its case."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        self.entries = tuple(entries)
        self._by_name: dict[str, Entry] = {}
        for entry in self.entries:
            for name in entry.names:
                other = self._by_name.setdefault(name.lower(), entry)
                if other is not entry:
                    raise ConfigurationError(
                        f"{entry.source} calls both {other.name} and {entry.name} {name!r}; a name may stand "
                        "for one model only."
                    )

    def find(self, name: str) -> Entry | None:
        """By name, alias or hub id."""
        return self._by_name.get(name.lower())

    def like(self, folder: str, sizes: Sizes) -> Entry | None:
        """The entry of a checkpoint: the one of its sizes with the longest name that is part of its folder's,
        else the first of its sizes, else the first of its family.
        """
        family = [entry for entry in self.entries if _family(entry) == sizes.family]
        same = [entry for entry in family if entry.is_as_large(sizes)]
        # max takes the first of equals: without any name in the folder's, the first entry.
        return max(same or family, key=lambda entry: _longest_name_in(folder, entry), default=None)


def _longest_name_in(folder: str, entry: Entry) -> int:
    """Characters of the longest of the entry's names that is part of the folder's; 0 for none."""
    names = [name.rpartition("/")[2].lower() for name in entry.names]
    return max((len(name) for name in names if name in folder.lower()), default=0)


def _family(entry: Entry) -> str:
    return str(entry.config.get("model_type", ""))


# ---- reading -------------------------------------------------------------------------------------


@functools.cache
def shipped_entries() -> tuple[Entry, ...]:
    """Ours; raises ConfigurationError for a mistake in them."""
    return tuple(_entries(SHIPPED, {}))


def load_registry() -> Registry:
    """Ours and the user's; raises ConfigurationError for a mistake in theirs, in one sentence."""
    own = config_root() / "models.yaml"
    entries = {entry.name: entry for entry in shipped_entries()}
    if own.exists():
        entries |= {entry.name: entry for entry in _entries(own, entries)}
    return Registry(entries.values())


def _entries(path: Path, known: Mapping[str, Entry]) -> Iterable[Entry]:
    try:
        content = yaml.load(
            path.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        )
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigurationError(f"{path} is no readable YAML ({_one_line(error)}); correct it.") from error
    if content is None:
        return
    if not isinstance(content, dict) or not isinstance(content.get("models"), dict):
        raise ConfigurationError(f"{path} must hold 'models:' with an entry for each name below it.")
    for name, said in content["models"].items():
        yield _entry(path, str(name), said, known.get(str(name)))


def _entry(path: Path, name: str, said: Any, known: Entry | None) -> Entry:
    where = f"{path}, model {name!r},"
    if not isinstance(said, dict):
        raise ConfigurationError(f"{where} is a {type(said).__name__}, expected fields with values.")
    fields = {f.name for f in dataclasses.fields(Entry)} - {"name", "source"}
    if unknown := sorted(set(said) - fields):
        raise ConfigurationError(
            f"{where} has a field {unknown[0]!r}; known are {', '.join(sorted(fields))}."
        )
    values = {key: _checked(where, key, value) for key, value in said.items()}
    if known is not None:
        return dataclasses.replace(known, **values, source=str(path))
    if "config" not in values:
        raise ConfigurationError(f"{where} has no 'config' with keys of the model's config.json.")
    return Entry(name=name, **values, source=str(path))


_LISTS = ("hub", "aliases", "flags", "notes")
_NUMBERS = ("parameters", "active_parameters", "size_bytes")
_CHOICES = {"method": _BITS, "dense": _DENSE_BITS}


def _checked(where: str, key: str, value: Any) -> Any:
    if key in _LISTS:
        items = value if isinstance(value, list) else [value]
        if not all(isinstance(item, str) for item in items):
            raise ConfigurationError(f"{where} has {key}: {value!r}, expected a list of texts.")
        return tuple(items)
    if key in _NUMBERS:
        # YAML 1.1 takes 671e9 for a text: it wants a point and a sign.
        try:
            return float(value)
        except (TypeError, ValueError):
            raise ConfigurationError(f"{where} has {key}: {value!r}, expected a number.") from None
    if key in _CHOICES and value not in _CHOICES[key]:
        raise ConfigurationError(f"{where} has {key}: {value!r}, expected one of {', '.join(_CHOICES[key])}.")
    expected = {"config": dict, "verified": bool}.get(key, str)
    if not isinstance(value, expected):
        raise ConfigurationError(f"{where} has {key}: {value!r}, expected a {expected.__name__}.")
    return value


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
