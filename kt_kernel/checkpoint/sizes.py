"""How many bytes of a checkpoint are experts."""

from __future__ import annotations

from collections.abc import Iterable

from kt_kernel.checkpoint.reader import Checkpoint


def expert_group_bytes(checkpoint: Checkpoint) -> dict[str, int]:
    """What each group of experts takes, by its name up to '.experts'."""
    return {
        base: stored_bytes(checkpoint, (f"{base}.{tail}" for tail in tails))
        for base, tails in checkpoint.expert_groups().items()
    }


def stored_bytes(checkpoint: Checkpoint, names: Iterable[str]) -> int:
    """What these tensors take."""
    infos = (checkpoint.info(name) for name in names)
    return sum(info.end - info.begin for info in infos)
