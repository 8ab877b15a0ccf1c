"""A whole conversion: layer by layer, matrices in parallel, each shard renamed when it is whole."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from kt_kernel.convert.layout import PROJECTIONS, ShardLayout, shard_layout, shard_name, tensor_names
from kt_kernel.convert.manifest import Identity, check_apart, claim, complete, locked
from kt_kernel.convert.matrix import content_hash
from kt_kernel.convert.progress import Progress
from kt_kernel.convert.quantise import quantise_matrix
from kt_kernel.convert.shard import ShardWriter, finished_hash, remove_unfinished
from kt_kernel.convert.source import SourceLayer, check_input_type, fingerprint, source_layers
from kt_kernel.convert.targets import Target
from kt_kernel.errors import ConversionError

# Where its tensors lie, and the hash of its source.
Shard = tuple[ShardLayout, str]

_SPARE_BYTES = 64 << 20  # copies, index, and what a file system takes for itself


@dataclass(frozen=True)
class Conversion:
    """What is asked for. `input_type`: what the input is said to hold; None = whatever it holds."""

    source: Path
    output: Path
    target: Target
    threads: int
    input_type: str | None = None


@dataclass(frozen=True)
class Outcome:
    """Layers converted now, and those found finished."""

    converted: int
    found: int
    output_bytes: int


def convert(conversion: Conversion, progress: Callable[[int], Progress] = Progress) -> Outcome:
    """Write `conversion.output`, continuing where an interrupted run of the same conversion stopped.

    Raises ConversionError or CheckpointError; finished layers stay, and the same call continues.
    """
    if conversion.threads < 1:
        raise ConversionError(f"{conversion.threads} threads were asked for, expected at least 1.")
    layers = source_layers(conversion.source)
    check_apart(conversion.source, conversion.output)
    check_input_type(layers, conversion.input_type)
    conversion = replace(conversion, target=_fitted(conversion.target, layers))
    identity = Identity(
        conversion.target, Path(os.path.realpath(conversion.source)).name, fingerprint(layers)
    )
    with locked(conversion.output), _single_torch_thread():
        claim(conversion.output, identity)
        return _convert(conversion, identity, layers, progress)


def _fitted(target: Target, layers: list[SourceLayer]) -> Target:
    widths = {}
    for layer in layers:
        widths[f"the hidden size of layer {layer.shape.index}"] = layer.shape.hidden
        widths[f"the intermediate size of layer {layer.shape.index}"] = layer.shape.intermediate
    return target.fitted(widths)


def _convert(
    conversion: Conversion,
    identity: Identity,
    layers: list[SourceLayer],
    progress: Callable[[int], Progress],
) -> Outcome:
    shards: dict[int, Shard] = {}
    for layer in layers:
        if (shard := _finished(conversion, layer)) is not None:
            shards[layer.shape.index] = shard
    rest = [layer for layer in layers if layer.shape.index not in shards]
    _check_space(
        conversion.output, sum(shard_layout(layer.shape, conversion.target).file_bytes for layer in rest)
    )
    if rest:
        shown = progress(sum(layer.stored_bytes for layer in rest))
        try:
            shards |= _convert_layers(conversion, rest, shown)
        finally:
            shown.end()
            remove_unfinished(conversion.output)
    shards = dict(sorted(shards.items()))
    complete(conversion.output, conversion.source, identity, shards)
    output_bytes = sum(layout.file_bytes for layout, _ in shards.values())
    return Outcome(len(rest), len(layers) - len(rest), output_bytes)


def _finished(conversion: Conversion, layer: SourceLayer) -> Shard | None:
    path = conversion.output / shard_name(layer.shape.index)
    if not path.exists():
        return None
    layout = shard_layout(layer.shape, conversion.target, layer.sample())
    return layout, finished_hash(path, layout)


def _convert_layers(
    conversion: Conversion, layers: list[SourceLayer], progress: Progress
) -> dict[int, Shard]:
    """The shard of each layer. While one is made durable the next is computed."""
    shards: dict[int, Shard] = {}
    durable: Future[None] | None = None
    with ThreadPoolExecutor(conversion.threads) as workers, ThreadPoolExecutor(1) as finisher:
        for number, layer in enumerate(layers):
            index = layer.shape.index
            progress.layer(f"layer {index} ({number + 1} of {len(layers)})")
            layout = shard_layout(layer.shape, conversion.target, layer.sample())
            writer = ShardWriter(conversion.output / shard_name(index), layout)
            try:
                source_hash = _write_layer(layer, conversion.target, writer, workers, progress)
                if durable is not None:
                    durable.result()
            except BaseException:
                writer.close()
                raise
            durable = finisher.submit(writer.finish, source_hash)
            shards[index] = (layout, source_hash)
        if durable is not None:
            durable.result()
    return shards


def _write_layer(
    layer: SourceLayer,
    target: Target,
    writer: ShardWriter,
    workers: ThreadPoolExecutor,
    progress: Progress,
) -> str:
    """Quantise and write every matrix of a layer; returns the hash of all its bytes."""
    stop = threading.Event()
    matrices = 3 * layer.shape.experts

    with layer.opened() as expert:

        def work(number: int) -> bytes:
            which, place = divmod(number, len(PROJECTIONS))
            if stop.is_set():
                return b""
            projection, matrix = expert(which).matrices()[place]
            names = tensor_names(layer.shape.index, which, projection)
            digest = content_hash(matrix)
            for name, tensor in zip(names, quantise_matrix(matrix, target), strict=True):
                writer.write(name, tensor)
            layer.checkpoint.drop_pages(matrix.tensors)
            progress.add(-(-layer.stored_bytes // matrices))
            return digest

        tasks = [workers.submit(work, number) for number in range(matrices)]
        try:
            done, _ = wait(tasks, return_when=FIRST_EXCEPTION)
            for task in done:
                task.result()
        finally:
            # Also when interrupted: no thread may use the views or the file afterwards.
            stop.set()
            wait(tasks)
    return hashlib.sha256(b"".join(task.result() for task in tasks)).hexdigest()


def _check_space(output: Path, needed: int) -> None:
    system = os.statvfs(output)
    free = system.f_bavail * system.f_frsize
    if needed and needed + _SPARE_BYTES > free:
        raise ConversionError(
            f"'{output}' has {free / 1e9:.2f} GB free, and the layers to write need {needed / 1e9:.2f} GB; "
            "free some space, or choose an output folder on another disk."
        )


@contextmanager
def _single_torch_thread() -> Iterator[None]:
    """The matrices are the parallelism; torch's own threads would only compete with it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
