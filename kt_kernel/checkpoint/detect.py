"""Which row of FORMATS a checkpoint holds, from the names, dtypes and shapes of its tensors.

One matrix of each layer is looked at; that the others are alike is checked when they are read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from kt_kernel.checkpoint import numa_parts
from kt_kernel.checkpoint.checks import require_tensor
from kt_kernel.checkpoint.families import (
    ExpertLocation,
    NumaPartNames,
    PackedNames,
    expert_layers,
    is_bias,
    known_groups,
    locate_experts,
    own_layers,
    stored_experts,
)
from kt_kernel.checkpoint.formats import FORMATS, Format
from kt_kernel.checkpoint.packed_names import fits_packed, packed_name, packed_scale
from kt_kernel.checkpoint.quantization_config import check_quantization_config
from kt_kernel.checkpoint.reader import MANIFEST, Checkpoint
from kt_kernel.errors import CheckpointError, MissingTensorError
from kt_kernel.formats.records import RECORDS


@dataclass(frozen=True)
class Found:
    """One layer's format, the suffix of its scales ("" for none), and the tensors that show it."""

    layer_idx: int
    location: ExpertLocation
    format: Format
    scale: str
    evidence: str


def stored_method(checkpoint: Checkpoint) -> str:
    """The method that reads the checkpoint, e.g. "FP8".

    Raises CheckpointError if there are no routed experts in it, if no method reads it, or if its layers need
    different methods.
    """
    method = _common_format(checkpoint).format.method
    check_quantization_config(checkpoint, method)
    return method


def draft_layer_method(checkpoint: Checkpoint, layer_idx: int) -> str | None:
    """The method that reads the experts of a draft model's layer; None if the checkpoint has none there.

    Raises CheckpointError if no method reads them.
    """
    location = expert_layers(checkpoint).get(layer_idx)
    return None if location is None else _look_at(checkpoint, layer_idx, location).format.method


def require_format(checkpoint: Checkpoint, layer_idx: int, method: str) -> Found:
    """The format of one layer; raises CheckpointError unless it and all other layers are what `method`
    reads."""
    location = locate_experts(checkpoint, layer_idx)
    if _is_draft(checkpoint, layer_idx):
        found = shown = _look_at(checkpoint, layer_idx, location)
    else:
        shown = _common_format(checkpoint)
        found = _layer_formats(checkpoint)[layer_idx]
    if shown.format.method != RECORDS[method].file_method:
        raise CheckpointError(
            f"method {method} was asked for, but '{checkpoint.path}' holds {shown.format.method} "
            f"({shown.evidence}); use method {shown.format.method} or AUTO."
        )
    return found


def _common_format(checkpoint: Checkpoint) -> Found:
    layers = list(_layer_formats(checkpoint).values())
    if not layers:
        raise MissingTensorError(
            f"'{checkpoint.path}' has no routed experts under any known name; groups of experts in it: "
            f"{known_groups(checkpoint)}."
        )
    for found in layers:
        if found.format.method != layers[0].format.method:
            raise CheckpointError(
                f"'{checkpoint.path}' mixes formats: layer {layers[0].layer_idx} holds "
                f"{layers[0].format.method} ({layers[0].evidence}) and layer {found.layer_idx} holds "
                f"{found.format.method} ({found.evidence}); all layers must be stored alike."
            )
    return layers[0]


_known: WeakKeyDictionary[Checkpoint, dict[int, Found]] = WeakKeyDictionary()


def _layer_formats(checkpoint: Checkpoint) -> dict[int, Found]:
    """Of the model's own layers."""
    if checkpoint not in _known:
        if checkpoint.config(MANIFEST).get("complete") is False:
            raise CheckpointError(
                f"'{checkpoint.path}' is a conversion that was not finished; run the command that made it "
                "again."
            )
        _known[checkpoint] = {
            layer: _look_at(checkpoint, layer, location)
            for layer, location in expert_layers(checkpoint).items()
            if not _is_draft(checkpoint, layer)
        }
    return _known[checkpoint]


def _is_draft(checkpoint: Checkpoint, layer_idx: int) -> bool:
    """Layers after the model's last one belong to a draft model, which may be stored in another format."""
    layers = own_layers(checkpoint)
    return layers is not None and layer_idx >= layers


def _look_at(checkpoint: Checkpoint, layer_idx: int, location: ExpertLocation) -> Found:
    if isinstance(location.names, PackedNames):
        return _look_at_packed(checkpoint, layer_idx, location)
    if isinstance(location.names, NumaPartNames):
        method, evidence = numa_parts.stored_method(checkpoint, location.base)
        return Found(layer_idx, location, next(row for row in FORMATS if row.method == method), "", evidence)
    first_seen = None
    for stem in _stems(checkpoint, location):
        present = _suffixes(checkpoint, stem)
        for row in FORMATS:
            scale = next((suffix for suffix in row.scales if suffix in present), "")
            if _fits(checkpoint, stem, row, scale):
                evidence = _describe(checkpoint, stem, [row.weight, *([scale] if scale else [])])
                return Found(layer_idx, location, row, scale, evidence)
        if first_seen is None and present:
            first_seen = stem
    raise _unreadable(checkpoint, layer_idx, first_seen)


def _look_at_packed(checkpoint: Checkpoint, layer_idx: int, location: ExpertLocation) -> Found:
    stem = f"{location.base}.{location.names.gate_up}"
    for row in FORMATS:
        if fits_packed(checkpoint, stem, row):
            scale = packed_scale(checkpoint, stem, row) or ""
            shown = [row.weight, *([scale] if scale else [])]
            kinds = (packed_name(checkpoint, stem, suffix) for suffix in shown)
            evidence = ", ".join(f"'{name}' is {checkpoint.info(name).dtype}" for name in kinds)
            return Found(layer_idx, location, row, scale, evidence)
    stored = [name for name in _names_of(checkpoint, location) if name.startswith(stem) and not is_bias(name)]
    name = stored[0] if stored else stem
    require_tensor(checkpoint, name)
    raise CheckpointError(
        f"tensor '{name}' in '{checkpoint.file_of(name).path}' has dtype {checkpoint.info(name).dtype}, and "
        f"with what is beside it ({', '.join(_names_of(checkpoint, location)[:6])}) no method reads it; "
        "convert the checkpoint to bfloat16."
    )


def _names_of(checkpoint: Checkpoint, location: ExpertLocation) -> list[str]:
    return [f"{location.base}.{tail}" for tail in sorted(checkpoint.expert_groups()[location.base])]


def _stems(checkpoint: Checkpoint, location: ExpertLocation) -> Iterator[str]:
    for expert in stored_experts(checkpoint, location.base):
        for projection in (location.names.gate, location.names.up, location.names.down):
            yield f"{location.base}.{expert}.{projection}"


def _fits(checkpoint: Checkpoint, stem: str, row: Format, scale: str) -> bool:
    if not _holds_codes(checkpoint, stem, row):
        return False
    if not row.scales:
        return True
    if not scale or checkpoint.info(f"{stem}.{scale}").dtype not in row.scale_dtypes:
        return False
    return row.told_by(
        checkpoint.info(f"{stem}.{row.weight}").shape, checkpoint.info(f"{stem}.{scale}").shape
    )


def _holds_codes(checkpoint: Checkpoint, stem: str, row: Format) -> bool:
    weight = f"{stem}.{row.weight}"
    return weight in checkpoint and checkpoint.info(weight).dtype in row.weight_shapes


def _suffixes(checkpoint: Checkpoint, stem: str) -> list[str]:
    group, _, head = stem.partition(".experts.")
    tails = checkpoint.expert_groups()[group + ".experts"]
    return [tail.removeprefix(head + ".") for tail in tails if tail.startswith(head + ".")]


def _describe(checkpoint: Checkpoint, stem: str, suffixes: list[str]) -> str:
    """ "'a.weight' is F8_E4M3 [256, 128], 'weight_scale' F32 [2, 1]"."""
    infos = [checkpoint.info(f"{stem}.{suffix}") for suffix in suffixes]
    kinds = [f"{info.dtype} {list(info.shape)}" for info in infos]
    beside = [f", '{suffix}' {kind}" for suffix, kind in zip(suffixes[1:], kinds[1:], strict=True)]
    return f"'{stem}.{suffixes[0]}' is {kinds[0]}{''.join(beside)}"


def _unreadable(checkpoint: Checkpoint, layer_idx: int, stem: str) -> CheckpointError:
    suffixes = _suffixes(checkpoint, stem)
    seen = f"layer {layer_idx} of '{checkpoint.path}': {_describe(checkpoint, stem, suffixes)}"
    rows = [row for row in FORMATS if _holds_codes(checkpoint, stem, row)]
    scales = sorted({f"{stem}.{suffix}" for row in rows for suffix in row.scales})
    present = [name for name in scales if name in checkpoint]
    if rows and not present:
        return MissingTensorError(
            f"{seen}, without its scales; expected one of {', '.join(repr(name) for name in scales)}."
        )
    if rows:
        dtypes = sorted({dtype for row in rows for dtype in row.scale_dtypes})
        return CheckpointError(f"{seen}; expected scales of dtype {', '.join(dtypes)}.")
    if f"{stem}.weight" in checkpoint and checkpoint.info(f"{stem}.weight").dtype in ("F16", "F32", "F64"):
        return CheckpointError(f"{seen}, which no method reads; convert the checkpoint to bfloat16.")
    known = sorted({f"{row.weight} ({' or '.join(row.weight_shapes)})" for row in FORMATS})
    return CheckpointError(f"{seen}, which no method reads; known are {', '.join(known)}.")
