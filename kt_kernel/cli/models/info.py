"""`kt model info`: what a model is and which kernels its experts would get, without reading a weight."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from kt_kernel.cli.machine import native_extension
from kt_kernel.cli.model import find_model, planned_model
from kt_kernel.cli.models.records import record_of
from kt_kernel.cli.tables import wrapped_rows
from kt_kernel.planning.checkpoint_facts import read_facts
from kt_kernel.planning.errors import gigabytes
from kt_kernel.planning.model_facts import REGISTRY, ModelFacts

_NOTHING_READ = "the registry's numbers; no file was read"
_IS_AUTO = "chosen"


@dataclass(frozen=True)
class Description:
    """`place`: its path, or a sentence if it is not here and the registry's numbers are all there is.
    `kernels`: (format, activations, kernel) that "auto" would take on this CPU for the method's formats.
    """

    name: str
    place: str
    facts: ModelFacts
    kernels: list[tuple[str, str, str]]
    source: str


def describe(name: str) -> Description:
    """Of a model on this machine, or of one that the registry knows.

    Raises:
        KTError: there is none, or it cannot be read.
    """
    planned = planned_model(name)
    if planned.missing and planned.entry is not None:
        place = f"not on this machine: kt model download {planned.missing}"
        facts = planned.entry.facts()
        return Description(planned.model.served_name, place, facts, _kernels(facts.method), _NOTHING_READ)
    model = find_model(name).model  # builds the demo
    facts = read_facts(model.path)
    record = record_of(model.path)
    source = f"{record.repository} at {record.commit[:12]}" if record and record.repository else ""
    return Description(model.served_name, str(model.path), facts, _kernels(facts.method), source)


def json_text(found: Description) -> str:
    """One object; bytes are numbers."""
    return json.dumps({**asdict(found), "total_bytes": found.facts.total_bytes}, indent=1)


def text(found: Description) -> str:
    """At most 80 columns."""
    facts, sizes = found.facts, found.facts.sizes
    container = "safetensors" if facts.container == REGISTRY else facts.container
    rows = [
        ("place", found.place),
        ("family", f"{sizes.family} ({sizes.architecture}), attention {sizes.attention}"),
        ("stored as", f"experts {facts.method}, the rest mostly {facts.dense_format}, in {container}"),
        (
            "layers",
            f"{sizes.layers}, of which {sizes.moe_layers} have {sizes.experts} routed experts each; a token "
            f"uses {sizes.top_k}",
        ),
        (
            "sizes",
            f"hidden {sizes.hidden}, of an expert {sizes.intermediate}; context {sizes.context} tokens",
        ),
        ("experts", f"{gigabytes(facts.expert_bytes)}, one {facts.bytes_per_expert / 1e6:.1f} MB"),
        ("the rest", f"{gigabytes(facts.dense_bytes)}"),
        ("KV cache", f"{sizes.kv_values_per_token} values a token"),
    ]
    if found.source:
        rows.append(("source", found.source))
    rows += [
        ("kernel", f"{kernel}, {activations} activations: {formats}")
        for formats, activations, kernel in found.kernels
    ]
    return "\n".join(wrapped_rows(("model", found.name), rows))


def _kernels(method: str) -> list[tuple[str, str, str]]:
    chosen = [
        (row["format"], row["activations"], row["kernel"])
        for row in native_extension().dispatch_table()
        if row["method"] == method and row["state"] == _IS_AUTO
    ]
    # A GGUF file has some of the method's many formats; those with the same kernel are one line.
    names: dict[tuple[str, str], list[str]] = {}
    for name, activations, kernel in chosen:
        names.setdefault((activations, kernel), []).append(name)
    return [(", ".join(formats), *key) for key, formats in names.items()]
