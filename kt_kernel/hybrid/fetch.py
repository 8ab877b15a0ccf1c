"""Miss policy "auto": some of a step's cold experts are brought to the device, the CPU computes the rest.

    ids ──> cold experts and their tokens ──> split by measured speeds (misses.py, speeds.py)
                                               ├─ CPU: computes its share        ┐ at the same time
                                               └─ bus: the others into a few     ┘
                                                  slots shared by all layers, where the device computes them

What is fetched serves this one call: which experts are resident is the updater's business. Looking at the ids
waits for the device, so a call that is being captured into a graph leaves all cold experts to the CPU.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version

import torch

from kt_kernel.errors import KTError
from kt_kernel.hybrid.context import HybridContext
from kt_kernel.hybrid.device import is_out_of_memory
from kt_kernel.hybrid.experts import DeviceExperts, bytes_of_slots
from kt_kernel.hybrid.feed import MISSES, ExpertFeed
from kt_kernel.hybrid.misses import split_misses
from kt_kernel.hybrid.options import AUTOMATIC
from kt_kernel.hybrid.placed import PlacedExperts
from kt_kernel.hybrid.slots import Placement, Tables
from kt_kernel.hybrid.speeds import (
    TOKENS_MEASURED,
    ExpertSpeeds,
    Key,
    cpu_name,
    read_speeds,
    seconds_per_expert,
    write_speeds,
)

logger = logging.getLogger(__name__)

# At most so many experts of a call are fetched; the slots for them are device memory that holds no resident
# expert. Not tuned: how many pay off depends on the bus, and no CUDA device has been measured yet.
_SLOTS = 8

# So many that one call takes far longer than fetching `_SLOTS` experts: between two calls all threads write.
_TOKENS_WHILE_FETCHING = 512


class Fetch:
    """The experts that one call fetches, and their slots in `target`.

    To be used in a `with` block: if the call fails before `compute`, the experts pass by all the same, for
    the other ranks count on this one.
    """

    def __init__(
        self, fetcher: MissFetcher, layer: PlacedExperts, target: DeviceExperts, experts: tuple[int, ...]
    ) -> None:
        self._fetcher = fetcher
        self._layer = layer
        self._target = target
        self._slots = {expert: slot for slot, expert in enumerate(experts)}
        self._tables = Tables(Placement(0, experts, layer.num_experts), layer.context.device)
        self._fetched = False

    def __enter__(self) -> Fetch:
        return self

    def __exit__(self, *_: object) -> None:
        if self._fetched:
            return
        try:
            self._feed().pass_by(self._slots)
        finally:
            self._fetcher.agree_on_memory(self._layer, None)

    def _feed(self) -> ExpertFeed:
        return self._layer.feed_for(MISSES)

    def skipped_by_cpu(self, resident: Tables) -> torch.Tensor:
        """bool [E+1]: the experts that are on the device already or will be."""
        return resident.on_device | self._tables.on_device

    def compute(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Bring them to the device, and their weighted sum: [T, H] like `hidden`.

        Raises KTError on all ranks if the device of one has no memory left.
        """
        self._fetched = True
        output, failure = None, None
        try:
            self._fetcher.bytes_copied += self._feed().fill(self._target, self._slots)
            self._fetcher.experts_fetched += len(self._slots)
            output = self._target.compute(hidden, self._tables.slots(ids), weights)
        except Exception as error:
            failure = error
        self._fetcher.agree_on_memory(self._layer, failure)
        if failure is not None:
            raise failure
        return output


class MissFetcher:
    """One per model; its methods belong to the thread that serves, in the same order on all ranks."""

    def __init__(self, context: HybridContext, layers: Sequence[PlacedExperts]) -> None:
        self.experts_fetched = 0
        self.bytes_copied = 0
        self._context = context
        self._layers = layers
        self._undecided = context.options.miss_policy == AUTOMATIC
        self._target: DeviceExperts | None = None
        self._speeds: ExpertSpeeds | None = None  # None = the CPU computes all cold experts

    @property
    def device_bytes(self) -> int:
        """Of the slots that there are now."""
        return bytes_of_slots(self._target)

    def begin_step(self) -> None:
        """At the first step: allocate on the device and find this machine's speeds."""
        if not (self._undecided and self._layers):
            return
        self._undecided = False
        # The last layer defers nothing, so it can be measured without a sum on its way from layer to layer.
        layer = self._layers[-1]
        self._target = self._allocate(layer)
        if self._target is not None:
            self._speeds = self._find_speeds(layer, self._target)

    def plan(self, layer: PlacedExperts, ids: torch.Tensor) -> Fetch | None:
        """What to fetch for a call with the experts `ids` [T, k]; None = nothing. Collective."""
        if self._speeds is None or self._context.backend.capturing():
            return None
        experts: tuple[int, ...] = ()
        if self._context.ranks.rank == 0:
            experts = split_misses(
                _cold_tokens(ids, layer.placement.current),
                self._speeds.cpu_seconds_of,
                self._speeds.fetch_seconds,
                self._target.capacity,
            )
        experts = self._context.ranks.broadcast(experts)
        return Fetch(self, layer, self._target, experts) if experts else None

    def agree_on_memory(self, layer: PlacedExperts, failure: Exception | None) -> None:
        """After every planned fetch, with the error that ended it, if any; collective.

        Raises KTError if memory was short on any rank, for the CPU has skipped what was to be fetched. Then
        nothing is fetched any more: the next call would end like this one.
        """
        enough = failure is None or not is_out_of_memory(failure)
        if self._context.ranks.minimum(int(enough)):
            return
        self._speeds = None
        self._context.backend.synchronize()  # the slots may be in use
        self._target = None
        logger.warning(
            "the device ran out of memory while it fetched experts: from now on the CPU computes all that "
            "are not resident; leave more memory free"
        )
        raise KTError(
            f"layer {layer.layer_idx}: the device ran out of memory while it fetched experts, so this pass "
            "failed; later ones fetch none and can be tried."
        ) from failure

    # ---- the first step ------------------------------------------------------------------------

    def _allocate(self, layer: PlacedExperts) -> DeviceExperts | None:
        try:
            target = layer.new_experts(min(_SLOTS, layer.num_experts))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            target = None
        if self._context.ranks.minimum(int(target is not None)):
            return target
        del target
        self._context.backend.release_memory()
        logger.warning(
            "the device has not enough free memory to fetch experts into: the CPU computes all that are not "
            "resident; leave more memory free"
        )
        return None

    def _find_speeds(self, layer: PlacedExperts, target: DeviceExperts) -> ExpertSpeeds:
        """Rank 0's, from the cache or measured by all ranks together."""
        key = _key(layer) if self._context.ranks.rank == 0 and layer.wrapper is not None else None
        speeds = self._context.ranks.broadcast(None if key is None else read_speeds(key))
        if speeds is None:
            measured = _Measurement(layer, target).run()
            if key is not None:
                write_speeds(key, measured)
            speeds = self._context.ranks.broadcast(measured)
        logger.info(
            "an expert of one token takes the CPU %.3f ms, fetching one takes %.3f ms",
            speeds.cpu_seconds[0] * 1e3,
            speeds.fetch_seconds * 1e3,
        )
        return speeds


class _Measurement:
    """Each call takes other experts of the layer than the one before, so that no cache has them."""

    def __init__(self, layer: PlacedExperts, target: DeviceExperts) -> None:
        self._layer = layer
        self._target = target
        self._next = 0

    def run(self) -> ExpertSpeeds | None:
        """None on ranks without CPU experts, which only take part in the fetching."""
        wrapper = self._layer.wrapper
        if wrapper is None:
            seconds_per_expert(self._fetch)
            return None
        # In serving the CPU computes while experts are fetched: they are written by one thread, not by all,
        # and share the memory's bandwidth.
        with _Busy(self._compute_at_length):
            fetch_seconds = seconds_per_expert(self._fetch)
        tokens = [count for count in TOKENS_MEASURED if count <= wrapper.chunked_prefill_size]
        cpu_seconds = [seconds_per_expert(lambda t=count: self._compute(t)) for count in tokens]
        return ExpertSpeeds(tuple(tokens), tuple(cpu_seconds), fetch_seconds)

    def _experts(self, count: int) -> list[int]:
        first = self._next
        self._next += count
        return [expert % self._layer.num_experts for expert in range(first, first + count)]

    def _compute(self, tokens: int) -> int:
        wrapper = self._layer.wrapper
        experts = self._experts(wrapper.num_experts_per_tok)
        ids = torch.tensor(experts).expand(tokens, -1).contiguous()
        hidden = torch.ones(tokens, wrapper.hidden_size, dtype=torch.bfloat16)
        wrapper.forward(hidden, ids, torch.ones(ids.shape))
        return len(experts)

    def _compute_at_length(self) -> None:
        self._compute(min(_TOKENS_WHILE_FETCHING, self._layer.wrapper.chunked_prefill_size))

    def _fetch(self) -> int:
        experts = self._experts(self._target.capacity)
        feed = self._layer.feed_for(MISSES)
        feed.fill(self._target, {expert: slot for slot, expert in enumerate(experts)})
        self._layer.context.backend.record().synchronize()
        return len(experts)


class _Busy:
    """Inside the `with` block another thread does `work` over and over; raises its error at the end."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="kt-measure")

    def __enter__(self) -> None:
        self._work()  # may still be allocating
        self._done = self._pool.submit(self._run)

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._pool.shutdown()
        self._done.result()

    def _run(self) -> None:
        while not self._stop.is_set():
            self._work()


def _key(layer: PlacedExperts) -> Key:
    """All that the speeds depend on."""
    device, wrapper = layer.context.device, layer.wrapper
    return {
        "kt_kernel": version("kt-kernel"),
        "cpu": cpu_name(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "ranks": layer.context.ranks.size,
        "method": wrapper.method,
        "hidden": wrapper.hidden_size,
        "intermediate": wrapper.share.size,
        "experts_per_token": wrapper.num_experts_per_tok,
        "threads": wrapper.cpu_infer.threads,
        "pools": wrapper.cpu_infer.subpools,
        "fetched": "while the CPU computes",  # files of earlier versions were measured on an idle CPU
    }


def _cold_tokens(ids: torch.Tensor, placement: Placement) -> dict[int, int]:
    """The tokens of each expert that was chosen and has no slot."""
    # Entry 0 counts the ids of -1.
    counts = torch.bincount(ids.cpu().reshape(-1).long() + 1, minlength=placement.num_experts + 1)[1:]
    counts[placement.mask] = 0
    return {expert: int(counts[expert]) for expert in counts.nonzero().flatten().tolist()}
