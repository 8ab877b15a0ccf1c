"""How published checkpoints name a layer's experts, as data.

A name is `{layer prefix}.{experts path}.{expert}.{projection}.{suffix}`, or one packed tensor for all
experts. A new model family is a new row; the code below does not change. Suffixes: formats.py.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum

from kt_kernel.checkpoint.checks import wrong_expert_count
from kt_kernel.checkpoint.reader import Checkpoint
from kt_kernel.errors import MissingTensorError

# The first prefix under which the layer has experts counts.
LAYER_PREFIXES = (
    "model.layers.{layer}",
    "language_model.model.layers.{layer}",
    "model.language_model.layers.{layer}",
    "layers.{layer}",
)

# Layers of a draft model that are counted from 0 again: they follow the model's own.
DRAFT_PREFIX = "mtp.layers.{layer}"


@dataclass(frozen=True)
class ExpertNames:
    """One tensor for each expert and projection."""

    family: str
    path: str
    gate: str
    up: str
    down: str


class GateUpRows(Enum):
    """How the rows of gate and up stand in their common matrix."""

    GATE_FIRST = "gate's rows before up's"
    ALTERNATING = "rows of gate and up in turn"  # gate's even, up's odd


@dataclass(frozen=True)
class PackedNames:
    """Tensors for all experts at once: packed.py. gate and up are in one, unless `up` names another, and
    `gate_up` is gate's. `told_by`: tensors one of which only checkpoints of this family have, where others
    have the same names."""

    family: str
    path: str
    gate_up: str
    down: str
    up: str = ""
    rows: GateUpRows = GateUpRows.GATE_FIRST
    told_by: tuple[str, ...] = ()


@dataclass(frozen=True)
class NumaPartNames:
    """Each expert cut and packed for NUMA nodes when it was converted: numa_parts.py."""

    family: str


PUBLISHED = ExpertNames("DeepSeek/Kimi/GLM/Qwen", "mlp.experts", "gate_proj", "up_proj", "down_proj")

FAMILIES: tuple[ExpertNames | PackedNames, ...] = (
    PUBLISHED,
    ExpertNames("Mixtral/MiniMax", "block_sparse_moe.experts", "w1", "w3", "w2"),
    ExpertNames("Mistral", "experts", "w1", "w3", "w2"),
    ExpertNames("DeepSeek-V4", "ffn.experts", "w1", "w3", "w2"),
    PackedNames(
        "gpt-oss",
        "mlp.experts",
        "gate_up_proj",
        "down_proj",
        rows=GateUpRows.ALTERNATING,
        told_by=("gate_up_proj_bias", "gate_up_proj.bias"),
    ),
    PackedNames("packed", "mlp.experts", "gate_up_proj", "down_proj"),
    PackedNames("Llama-4", "feed_forward.experts", "gate_up_proj", "down_proj"),
    PackedNames("Step-3.5", "moe", "gate_proj", "down_proj", up="up_proj"),
    ExpertNames("Llama-4, unpacked", "feed_forward.experts", "gate_proj", "up_proj", "down_proj"),
)


NUMA_PARTS = NumaPartNames("converted for NUMA nodes")
NUMA_PARTS_LAYER = re.compile(r"blk\.(\d+)")

_BIAS = re.compile(r"(\.|_proj_)bias$")


@dataclass(frozen=True)
class ExpertLocation:
    """Where one layer's experts are: `base` + the names of a family."""

    base: str
    names: ExpertNames | PackedNames | NumaPartNames


def locate_experts(checkpoint: Checkpoint, layer_idx: int) -> ExpertLocation:
    """Find the family and prefix of one layer; raises MissingTensorError when the layer has no known
    experts."""
    location = expert_layers(checkpoint).get(layer_idx)
    if location is not None:
        return location
    tried = f"{LAYER_PREFIXES[0].format(layer=layer_idx)}.{FAMILIES[0].path}.0.{FAMILIES[0].gate}.weight"
    raise MissingTensorError(
        f"layer {layer_idx} has no routed experts in '{checkpoint.path}' under any known name (such as "
        f"'{tried}'); groups of experts in the file: {known_groups(checkpoint)}; check layer_idx and "
        "weight_path."
    )


def expert_layers(checkpoint: Checkpoint) -> dict[int, ExpertLocation]:
    """Layer index -> where its experts are, for every layer that has some, in ascending order."""
    groups = checkpoint.expert_groups()
    found: dict[int, ExpertLocation] = {}
    own = own_layers(checkpoint)
    draft = [] if own is None else [(DRAFT_PREFIX, own)]
    for prefix, first in [*((prefix, 0) for prefix in LAYER_PREFIXES), *draft]:
        for names in FAMILIES:
            pattern = re.compile(re.escape(f"{prefix}.{names.path}").replace(r"\{layer\}", r"(\d+)"))
            for base, tails in groups.items():
                match = pattern.fullmatch(base)
                if match and _belongs(names, tails):
                    found.setdefault(first + int(match[1]), ExpertLocation(base, names))
    for base in groups:
        if match := NUMA_PARTS_LAYER.fullmatch(base):
            found.setdefault(int(match[1]), ExpertLocation(base, NUMA_PARTS))
    return dict(sorted(found.items()))


def own_layers(checkpoint: Checkpoint) -> int | None:
    """How many decoder layers the model has by its config.json, without those of a draft model."""
    config = checkpoint.config()
    return config.get("num_hidden_layers") or (config.get("text_config") or {}).get("num_hidden_layers")


def known_groups(checkpoint: Checkpoint) -> str:
    """The first few groups of experts in the file, for messages."""
    return ", ".join(sorted(checkpoint.expert_groups())[:3]) or "none"


def stored_experts(checkpoint: Checkpoint, base: str) -> list[int]:
    """Ids of the experts stored one by one under `base`, ascending."""
    tails = checkpoint.expert_groups()[base]
    return sorted({int(expert) for tail in tails if (expert := tail.partition(".")[0]).isdigit()})


def check_expert_count(checkpoint: Checkpoint, base: str, num_experts: int) -> None:
    """Raise CheckpointError unless the experts stored one by one under `base` are 0 to num_experts - 1."""
    in_file = stored_experts(checkpoint, base)[-1] + 1
    if in_file != num_experts:
        raise wrong_expert_count(checkpoint, base, in_file=in_file, num_experts=num_experts)


def is_bias(tail: str) -> bool:
    """A matrix's, `0.down_proj.bias` or `gate_up_proj_bias`; not a router's `e_score_correction_bias`."""
    return _BIAS.search(tail) is not None


def _belongs(names: ExpertNames | PackedNames, tails: list[str]) -> bool:
    if isinstance(names, PackedNames):
        if names.told_by and not any(name in tails for name in names.told_by):
            return False
        return any(tail.startswith((names.gate_up, names.down)) for tail in tails)
    projections = {names.gate, names.up, names.down}
    return any(_projection_of(tail) in projections for tail in tails)


def _projection_of(tail: str) -> str:
    """'17.up_proj.weight' -> 'up_proj'; '' for a packed tensor."""
    expert, _, rest = tail.partition(".")
    return rest.partition(".")[0] if expert.isdigit() else ""
