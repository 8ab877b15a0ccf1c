"""What config.json says about the quantisation: checked where it would change the numbers.

Names, dtypes and shapes of the tensors decide the format (detect.py). They cannot show everything: whether
GPTQ reordered its columns, or how large the blocks of a ragged matrix are.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from kt_kernel.checkpoint.reader import Checkpoint
from kt_kernel.errors import CheckpointError
from kt_kernel.formats.records import RECORDS
from kt_kernel.formats.shapes import BLOCK

PER_ROW = 0

_YES, _NO = (True,), (False,)


def check_quantization_config(checkpoint: Checkpoint, method: str) -> int | None:
    """The group size that the configuration promises: columns, PER_ROW, or None if it says nothing.

    Raises CheckpointError for what `method` cannot compute: reordered columns, zero points, other block
    sizes, another number of bits.
    """
    check = _CHECKS.get(RECORDS[method].config_rules)
    return check(checkpoint) if check else None


def _read(checkpoint: Checkpoint) -> dict[str, Any]:
    config = checkpoint.config()
    text_config = config.get("text_config") or {}  # multimodal checkpoints nest the language model
    said = config.get("quantization_config") or text_config.get("quantization_config")
    return said if isinstance(said, dict) else {}


def _weight_schemes(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """What compressed-tensors says of the weights, for each group of layers."""
    groups = _read(checkpoint).get("config_groups")
    groups = groups.values() if isinstance(groups, dict) else []
    return [group["weights"] for group in groups if isinstance(group, dict) and group.get("weights")]


def _check_gptq(checkpoint: Checkpoint) -> int | None:
    config = _read(checkpoint) or checkpoint.config("quantize_config.json")
    if not config:
        raise _refused(checkpoint, "says nothing about the quantisation", "sym=true and desc_act=false")
    name = config.get("quant_method", "gptq")
    _require(checkpoint, "quant_method", name, "gptq", "auto-round")
    _require(checkpoint, "bits", config.get("bits"), 4)
    _require(checkpoint, "sym", config.get("sym"), *_YES)
    _require(checkpoint, "desc_act", config.get("desc_act", False), *_NO)
    return _group_size(config.get("group_size"))


def _check_compressed_tensors(checkpoint: Checkpoint) -> int | None:
    """Of a checkpoint with several groups of layers, the 4-bit integer ones can be the experts'."""
    groups = [weights for weights in _weight_schemes(checkpoint) if weights.get("type", "int") == "int"]
    if groups and all(weights.get("num_bits") != 4 for weights in groups):
        _require(checkpoint, "num_bits", groups[0].get("num_bits"), 4)
    groups = [weights for weights in groups if weights.get("num_bits") == 4]
    for weights in groups:
        _require(checkpoint, "symmetric", weights.get("symmetric", True), *_YES)
        if weights.get("actorder") in ("group", "dynamic", True):
            raise _refused(
                checkpoint, f"says actorder={json.dumps(weights['actorder'])}", "columns in their own order"
            )
    sizes = {
        PER_ROW if weights.get("strategy") == "channel" else _group_size(weights.get("group_size"))
        for weights in groups
    }
    return sizes.pop() if len(sizes) == 1 else None


def _check_blocks(checkpoint: Checkpoint) -> None:
    sizes = [weights.get("block_structure") for weights in _weight_schemes(checkpoint)]
    for size in [_read(checkpoint).get("weight_block_size"), *sizes]:
        if size is not None:
            _require(checkpoint, "block size", list(size), [BLOCK, BLOCK])


# By the `config_rules` of the method's record.
_CHECKS: dict[str, Callable[[Checkpoint], int | None]] = {
    "gptq": _check_gptq,
    "compressed-tensors": _check_compressed_tensors,
    "blocks": _check_blocks,
}


def _group_size(value: int | None) -> int | None:
    return PER_ROW if value == -1 else value


def _require(checkpoint: Checkpoint, key: str, seen: Any, *expected: Any) -> None:
    if seen not in expected:
        raise _refused(
            checkpoint,
            f"says {key}={json.dumps(seen)}",
            " or ".join(f"{key}={json.dumps(value)}" for value in expected),
        )


def _refused(checkpoint: Checkpoint, seen: str, expected: str) -> CheckpointError:
    return CheckpointError(
        f"the config.json of '{checkpoint.path}' {seen}, but only {expected} can be computed with; take a "
        "checkpoint quantised that way."
    )
