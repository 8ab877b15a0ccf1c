"""Experts on their way from CPU memory to the device: written by rank 0, two at a time, for all ranks.

    rank 0    write e0 into buffer 0 │ write e1 into buffer 1 │ write e2 into buffer 0 │ ...
    each rank                        │ copy e0 to its device  │ copy e1 to its device  │ ...

A `Channel` is the memory; an `ExpertFeed` is one layer's way to use it. The ranks of a channel agree through
counters in the shared memory and not through collective calls, so that a channel may be used by a thread
beside the one that serves. All ranks must ask for the same experts in the same order.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch

from kt_kernel.errors import CallOrderError, KTError
from kt_kernel.expert_image import ExpertEncoding, ExpertTensors
from kt_kernel.hybrid.device import Backend, Event
from kt_kernel.hybrid.experts import DeviceExperts
from kt_kernel.hybrid.ranks import Ranks

if TYPE_CHECKING:
    from kt_kernel.moe import KTMoEWrapper

# Users of channels: each is a thread.
COPIES = "copies"  # the copying thread (copies.py)
MISSES = "misses"  # the thread that serves

_BUFFERS = 2
_HEADER_BYTES = 4096  # a counter per rank and three of rank 0, with room for many ranks
_POLL_SECONDS = 50e-6
# Far more than the slowest write or copy: whoever waits this long waits for a process that has ended.
_GIVE_UP_SECONDS = 300.0


class Channel:
    """Host memory for two experts of every rank. Made by all ranks together (`Ranks.shared_memory`).

    `sequence` numbers count the experts that have passed since the channel was made.
    """

    def __init__(self, encoding: ExpertEncoding, ranks: Ranks, backend: Backend) -> None:
        self.encoding = encoding
        self._ranks = ranks
        self._backend = backend
        size = encoding.bytes
        if ranks.size == 1:
            self._memory = backend.host_memory(_BUFFERS * size)
            self._written = self._failed = self._taken = None
        else:
            shared = ranks.shared_memory(_HEADER_BYTES + ranks.size * _BUFFERS * size)
            counters = shared[:_HEADER_BYTES].view(torch.int64).numpy()
            self._written, self._failed = counters[:1], counters[1 : 1 + _BUFFERS]
            self._taken = counters[1 + _BUFFERS : 1 + _BUFFERS + ranks.size]
            self._memory = shared[_HEADER_BYTES:]
            mine = ranks.rank * _BUFFERS * size
            backend.page_lock(self._memory[mine : mine + _BUFFERS * size])
        self._views = [[self._view(rank, buffer) for buffer in range(_BUFFERS)] for rank in range(ranks.size)]
        self._copied: list[Event | None] = [None] * _BUFFERS
        self._sequence = 0

    def _view(self, rank: int, buffer: int) -> ExpertTensors:
        begin = (rank * _BUFFERS + buffer) * self.encoding.bytes
        return self.encoding.views(self._memory[begin : begin + self.encoding.bytes])

    def pass_on(self, wrapper: KTMoEWrapper | None, expert: int) -> ExpertTensors:
        """This rank's shard of `expert`, valid until the call after the next; then comes `done_with`.

        If rank 0 cannot write it, all ranks raise here, and stay in step.
        """
        buffer = self._sequence % _BUFFERS
        self._wait_for_copies(buffer)
        failure: BaseException | None = None
        if wrapper is not None:
            try:
                wrapper.write_expert(expert, [views[buffer] for views in self._views])
            except BaseException as error:
                failure = error
        self._sequence += 1
        self._hand_over(buffer, failure)
        return self._views[self._ranks.rank][buffer]

    def done_with(self) -> None:
        """The current stream has been given the copies of what `pass_on` returned last."""
        self._copied[(self._sequence - 1) % _BUFFERS] = self._backend.record()

    def _wait_for_copies(self, buffer: int) -> None:
        """Until all ranks have copied what was in `buffer`, expert number `sequence - 1`."""
        event, self._copied[buffer] = self._copied[buffer], None
        if event is not None:
            event.synchronize()
        if self._taken is None:
            return
        passed = self._sequence - 1
        self._taken[self._ranks.rank] = passed
        if self._ranks.rank == 0:
            self._poll(lambda: int(self._taken.min()) >= passed)

    def _hand_over(self, buffer: int, failure: BaseException | None) -> None:
        """Rank 0 tells the others that expert number `sequence` is there, or is not; they wait for that."""
        sequence = self._sequence
        if self._written is not None and self._ranks.rank == 0:
            if failure is not None:
                self._failed[buffer] = sequence
            self._written[0] = sequence
        if failure is not None:
            raise failure
        if self._written is not None and self._ranks.rank > 0:
            self._poll(lambda: int(self._written[0]) >= sequence)
            if self._failed[buffer] == sequence:
                raise KTError("rank 0 could not write an expert for this rank; its log says why.")

    def _poll(self, reached: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _GIVE_UP_SECONDS
        while not reached():
            if time.monotonic() > deadline:
                raise CallOrderError(
                    f"rank {self._ranks.rank} waited {_GIVE_UP_SECONDS:.0f} seconds for the experts of "
                    "another rank, which must have ended; restart the server."
                )
            time.sleep(_POLL_SECONDS)

    @property
    def host_bytes(self) -> int:
        """The memory that all ranks share counts for each of them."""
        return self._memory.nbytes


class ExpertFeed:
    """The experts of one layer. `wrapper` has them on rank 0 and is None elsewhere."""

    def __init__(self, wrapper: KTMoEWrapper | None, encoding: ExpertEncoding, channel: Channel) -> None:
        if encoding != channel.encoding:
            raise CallOrderError(
                f"experts of {encoding} cannot pass through a channel made for {channel.encoding}; make one "
                "channel per encoding."
            )
        self._wrapper = wrapper
        self._channel = channel

    def experts(self, ids: Iterable[int]) -> Iterator[tuple[int, ExpertTensors]]:
        """Each expert with this rank's shard of it, in host memory, valid until the next is asked for.

        What the caller does with it must be in the order of the current stream.
        """
        for expert in ids:
            tensors = self._channel.pass_on(self._wrapper, expert)
            try:
                yield expert, tensors
            finally:
                self._channel.done_with()

    def pass_by(self, ids: Iterable[int]) -> None:
        """Let experts pass that this rank has no use for any more, but the others count on."""
        for _ in self.experts(ids):
            pass

    def fill(self, target: DeviceExperts, slots: Mapping[int, int]) -> int:
        """Store the experts that are the keys of `slots` in those slots of `target`.

        Returns the bytes copied from host to device. An error of `target` is raised after the last expert
        has passed, for the other ranks count on this one.
        """
        copied, failure = 0, None
        for expert, tensors in self.experts(slots):
            if failure is None:
                try:
                    copied += target.store(slots[expert], tensors)
                except Exception as error:
                    failure = error
        if failure is not None:
            raise failure
        return copied
