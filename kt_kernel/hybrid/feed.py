"""Experts on their way from CPU memory to the device, through host buffers of all ranks.

    rank 0    write e0 into buffer 0 │ write e1 into buffer 1 │ write e2 into buffer 2 │ ...
    each rank                        │ copy e0 to its device  │ copy e1 to its device  │ ...

The loop is the extension's (csrc/moe/expert_pipeline.h); Python starts it once for a list of experts. Where
the device's slots take the stored bytes as they are, the copies go there (`DeviceExperts.places`). Else whole
images go into as many buffers on the device, and Python enqueues what decodes each, beside the next writes:

    a native thread    write e1, copy it        │ write e2, copy it        │ ...
    this thread        enqueue the decode of e0 │ enqueue the decode of e1 │ ...

A `Channel` is the memory; an `ExpertFeed` is one layer's way to use it. The ranks of a channel agree through
counters in the shared memory and not through collective calls, so that a channel may be used by a thread
beside the one that serves. All ranks must ask for the same experts in the same order.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch

from kt_kernel import kt_kernel_ext
from kt_kernel.errors import CallOrderError, ConfigurationError, InputError, KTError
from kt_kernel.formats.expert_image import ExpertEncoding, ExpertTensors
from kt_kernel.hybrid.device import Backend
from kt_kernel.hybrid.experts import DeviceExperts
from kt_kernel.hybrid.ranks import Ranks
from kt_kernel.moe import KTMoEWrapper

# Users of channels: each is a thread.
COPIES = "copies"  # the copying thread (copies.py)
MISSES = "misses"  # the thread that serves

# While one is written, one is copied, and one waits for the bus while the thread that waited for a copy
# wakes up. (bench/copying.py, 50 GB/s, 50 us to wake up, experts of 4 MB: 80 % of the bus with 2
# buffers, 97 % with 3, 4 and 6.)
BUFFERS = 3
_HEADER_BYTES = 4096  # one counter, one per buffer and one per rank, with room for many ranks

# The stored bytes of an expert on the device -> bytes that crossed the bus.
Store = Callable[[int, ExpertTensors], int]


class Channel:
    """Host memory for a few experts of every rank. Made by all ranks together (`Ranks.shared_memory`)."""

    def __init__(self, encoding: ExpertEncoding, ranks: Ranks, backend: Backend) -> None:
        self.encoding = encoding
        self._backend = backend
        counters, size = 0, BUFFERS * encoding.bytes
        if ranks.size == 1:
            self._memory = backend.host_memory(size)
        else:
            self._shared = ranks.shared_memory(_HEADER_BYTES + ranks.size * size)
            counters = self._shared.data_ptr()
            self._memory = self._shared[_HEADER_BYTES:]
            backend.page_lock(self._memory[ranks.rank * size : (ranks.rank + 1) * size])
        self.pipeline = kt_kernel_ext.ExpertPipeline(
            image_bytes=encoding.bytes,
            parts=encoding.spans,
            buffers=BUFFERS,
            rank=ranks.rank,
            memory=self._memory.data_ptr(),
            counters=counters,
            pids=ranks.gather(os.getpid()),
        )
        self._copies = backend.copies(BUFFERS)
        self._on_device: list[torch.Tensor] = []
        self._addresses: WeakKeyDictionary[DeviceExperts, torch.Tensor] = WeakKeyDictionary()

    def pass_by(self, wrapper: KTMoEWrapper | None, experts: Sequence[int]) -> None:
        """The experts are written and go nowhere."""
        with _errors_of(wrapper):
            self.pipeline.run(*_source(wrapper), experts, 0, self._copies)

    def copy(self, wrapper: KTMoEWrapper | None, experts: Sequence[int], addresses: torch.Tensor) -> None:
        """Enqueue the copies of each expert to where row i of `addresses` (int64 [n, 5]) says.

        In the order of the current stream.
        """
        self._backend.direct(self._copies)
        with _errors_of(wrapper):
            self.pipeline.run(*_source(wrapper), experts, addresses.data_ptr(), self._copies)

    def store(self, wrapper: KTMoEWrapper | None, experts: Sequence[int], store: Store) -> int:
        """Bring each expert to the device and call `store` with it, whose work is the current stream's.

        Returns the sum of what it returns. Its first error is raised after the last expert has passed.
        """
        self._backend.beside(self._copies)
        buffers = self._device_buffers()
        copied, failure = 0, None
        with _errors_of(wrapper):
            run = self.pipeline.start(*_source(wrapper), experts, self._staging.data_ptr(), self._copies)
            for expert in experts:
                buffer = run.next()
                if buffer < 0:
                    break
                if failure is None:
                    try:
                        copied += store(expert, buffers[buffer])
                    except Exception as error:
                        failure = error
                run.used()
            run.finish()
        if failure is not None:
            raise failure
        return copied

    def _device_buffers(self) -> list[ExpertTensors]:
        """Made at the first use: most slots take experts as they are stored."""
        if not self._on_device:
            size = self.encoding.bytes
            self._staging = torch.empty(BUFFERS * size, dtype=torch.uint8, device=self._backend.device)
            # What had this memory before may still be running on the stream that it is taken on.
            for buffer in range(BUFFERS):
                self._copies.mark_used(buffer)
            self._on_device = [self.encoding.views(part) for part in self._staging.split(size)]
        return self._on_device

    def addresses(self, target: DeviceExperts, slots: Sequence[int]) -> torch.Tensor | None:
        """Of an expert's parts in each of `slots`: int64 [n, 5], 0 = left out; None = `store` fills them."""
        if not slots:
            return torch.empty(0, 5, dtype=torch.int64)
        first = self._addresses_in(target, slots[0])
        if first is None:
            return None
        # Looking at each of hundreds of slots would take longer than copying small experts.
        known = self._addresses.get(target)
        if known is None or known[slots[0]].tolist() != first:
            known = torch.tensor([self._addresses_in(target, slot) for slot in range(target.capacity)])
            self._addresses[target] = known
        return known[list(slots)]

    def _addresses_in(self, target: DeviceExperts, slot: int) -> list[int] | None:
        places = target.places(slot)
        if places is None:
            return None
        for place, (_, size) in zip(places, self.encoding.spans, strict=True):
            if place is not None and not (place.is_contiguous() and place.nbytes == size):
                raise ConfigurationError(
                    f"a slot has {place.nbytes} bytes ({list(place.shape)}, strides {list(place.stride())}) "
                    f"for a part of {self.encoding.method} experts of {size} bytes in a row; give no places "
                    "for such slots."
                )
        return [0 if place is None else place.data_ptr() for place in places]

    @property
    def host_bytes(self) -> int:
        """The memory that all ranks share counts for each of them."""
        return self._memory.nbytes

    @property
    def device_bytes(self) -> int:
        """Of the buffers on the device, which are made at the first use."""
        return len(self._on_device) * self.encoding.bytes


class ExpertFeed:
    """The experts of one layer. `wrapper` has them on rank 0 of the channel's and is None elsewhere."""

    def __init__(self, wrapper: KTMoEWrapper | None, encoding: ExpertEncoding, channel: Channel) -> None:
        if encoding != channel.encoding:
            raise CallOrderError(
                f"experts of {encoding} cannot pass through a channel made for {channel.encoding}; make one "
                "channel per encoding."
            )
        self._wrapper = wrapper
        self._channel = channel

    def pass_by(self, ids: Iterable[int]) -> None:
        """Let experts pass that this rank has no use for any more, but the others count on."""
        self._channel.pass_by(self._wrapper, list(ids))

    def fill(self, target: DeviceExperts, slots: Mapping[int, int]) -> int:
        """Store the experts that are the keys of `slots` in those slots of `target`.

        Returns the bytes copied from host to device. An error of `target` is raised after the last expert
        has passed, for the other ranks count on this one.
        """
        experts = list(slots)
        before = self._channel.pipeline.passed
        try:
            addresses = self._channel.addresses(target, list(slots.values()))
            if addresses is None:
                return self._channel.store(
                    self._wrapper, experts, lambda expert, tensors: target.store(slots[expert], tensors)
                )
        except Exception:
            if self._channel.pipeline.passed == before:
                self.pass_by(experts)
            raise
        self._channel.copy(self._wrapper, experts, addresses)
        sizes = torch.tensor([size for _, size in self._channel.encoding.spans])
        return int(((addresses != 0) * sizes).sum())


def _source(wrapper: KTMoEWrapper | None) -> tuple[kt_kernel_ext.MoeLayer | None, int]:
    """What the pipeline writes experts from: nothing on other ranks than 0."""
    return (None, 0) if wrapper is None else (wrapper.moe, wrapper.global_scales.data_ptr())


@contextmanager
def _errors_of(wrapper: KTMoEWrapper | None) -> Iterator[None]:
    try:
        yield
    except kt_kernel_ext.RankFailure as error:
        raise KTError(f"{error}.") from None
    except KTError:
        raise
    except ValueError as error:
        raise InputError(f"{'' if wrapper is None else f'layer {wrapper.layer_idx}: '}{error}") from None
