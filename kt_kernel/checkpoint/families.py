"""How published checkpoints name a layer's experts, as data.

A name is `{layer prefix}.{experts path}.{expert}.{projection}.weight`, or one packed tensor for all
experts. A new model family is a new row; the code below does not change.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from kt_kernel.checkpoint.reader import Checkpoint
from kt_kernel.errors import CheckpointError, MissingTensorError

# The first prefix under which the layer has experts counts.
LAYER_PREFIXES = (
    "model.layers.{layer}",
    "language_model.model.layers.{layer}",
    "model.language_model.layers.{layer}",
    "layers.{layer}",
)


@dataclass(frozen=True)
class ExpertNames:
    """One tensor for each expert and projection."""

    family: str
    path: str
    gate: str
    up: str
    down: str


@dataclass(frozen=True)
class PackedNames:
    """Two tensors for all experts: gate_up [E, 2I, H] (the first I rows of an expert are gate) and down [E,
    H, I]."""

    family: str
    path: str
    gate_up: str
    down: str


FAMILIES: tuple[ExpertNames | PackedNames, ...] = (
    ExpertNames("Qwen/DeepSeek/GLM", "mlp.experts", "gate_proj", "up_proj", "down_proj"),
    ExpertNames("Mixtral/MiniMax", "block_sparse_moe.experts", "w1", "w3", "w2"),
    ExpertNames("Mistral", "experts", "w1", "w3", "w2"),
    PackedNames("packed", "mlp.experts", "gate_up_proj", "down_proj"),
)


@dataclass(frozen=True)
class ExpertLocation:
    """Where one layer's experts are: `base` + the names of a family."""

    base: str
    names: ExpertNames | PackedNames


def locate_experts(checkpoint: Checkpoint, layer_idx: int) -> ExpertLocation:
    """Find the family and prefix of one layer; raises MissingTensorError when the layer has no known
    experts."""
    groups = checkpoint.expert_groups()
    for prefix in LAYER_PREFIXES:
        for names in FAMILIES:
            base = f"{prefix.format(layer=layer_idx)}.{names.path}"
            if _belongs(names, groups.get(base, ())):
                return ExpertLocation(base, names)
    tried = f"{LAYER_PREFIXES[0].format(layer=layer_idx)}.{FAMILIES[0].path}.0.{FAMILIES[0].gate}.weight"
    known = ", ".join(sorted(groups)[:3]) or "none"
    raise MissingTensorError(
        f"layer {layer_idx} has no routed experts in '{checkpoint.path}' under any known name (such as "
        f"'{tried}'); groups of experts in the file: {known}; check layer_idx and weight_path."
    )


def check_expert_count(checkpoint: Checkpoint, base: str, num_experts: int) -> None:
    """Raise CheckpointError unless the experts stored one by one under `base` are 0 to num_experts - 1."""
    tails = checkpoint.expert_groups()[base]
    ids = {int(expert) for tail in tails if (expert := tail.partition(".")[0]).isdigit()}
    if max(ids) + 1 != num_experts:
        raise wrong_expert_count(checkpoint, base, in_file=max(ids) + 1, num_experts=num_experts)


def wrong_expert_count(
    checkpoint: Checkpoint, base: str, *, in_file: int, num_experts: int
) -> CheckpointError:
    """The error for a checkpoint whose layer has another number of experts than the model's description."""
    return CheckpointError(
        f"num_experts is {num_experts}, but '{checkpoint.path}' holds {in_file} experts under '{base}'; "
        "take the weights and the config.json from the same model."
    )


def _belongs(names: ExpertNames | PackedNames, tails: Iterable[str]) -> bool:
    if isinstance(names, PackedNames):
        return any(tail in (names.gate_up, names.down) for tail in tails)
    projections = {names.gate, names.up, names.down}
    return any(_projection_of(tail) in projections for tail in tails)


def _projection_of(tail: str) -> str:
    """'17.up_proj.weight' -> 'up_proj'; '' for a packed tensor."""
    expert, _, rest = tail.partition(".")
    return rest.partition(".")[0] if expert.isdigit() else ""
