"""Dynamic update: a pass that reads a half-written slot, ranks that split, or copies that nobody needed.

The device is a list: slot s holds the number of an expert, or GARBAGE while it is being written.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from hybrid_models import wait_for_copy

from kt_kernel.hybrid.copies import CopyWorker
from kt_kernel.hybrid.device import backend_of
from kt_kernel.hybrid.options import HybridOptions
from kt_kernel.hybrid.ranks import ALONE
from kt_kernel.hybrid.slots import EMPTY, LayerPlacement, Placement
from kt_kernel.hybrid.statistics import LayerStatistics
from kt_kernel.hybrid.update import BackgroundUpdater

CPU = torch.device("cpu")
BYTES = 1000
GARBAGE = -2
EXPERTS, TOP_K, CAPACITY = 32, 4, 8
# Often enough that it is no chance, and none of them has a slot at first.
FAVOURITES = torch.tensor([[20, 21, 22, 23]]).expand(9, TOP_K)


class ListedExperts:
    """Device experts that remember what was put where."""

    bytes_per_expert = BYTES

    def __init__(self, held: Sequence[int]) -> None:
        self.capacity = len(held)
        self.held = list(held)
        self.go = threading.Event()  # cleared = stores wait
        self.go.set()
        self.started = threading.Event()
        self.full = False

    def store(self, slot: int, tensors: int) -> int:
        self.held[slot] = GARBAGE
        self.started.set()
        if self.full:
            raise MemoryError("the device is full")
        assert self.go.wait(30)
        self.held[slot] = tensors
        return BYTES

    def copy_slot(self, slot: int, source: ListedExperts, source_slot: int) -> None:
        self.held[slot] = source.held[source_slot]


class Layer:
    """What the updater needs of a layer; an expert's "tensors" are its number."""

    def __init__(self, layer_idx: int = 0, mask: torch.Tensor | None = None) -> None:
        if mask is None:
            mask = torch.arange(EXPERTS) < CAPACITY
        self.layer_idx = layer_idx
        self.placement = LayerPlacement(Placement.initial(mask))
        self.statistics = LayerStatistics(EXPERTS, half_life_tokens=256)
        self.resident = ListedExperts(self.placement.current.expert_of_slot)

    def fill_slots(self, slots: dict[int, int]) -> int:
        return sum(self.resident.store(slot, expert) for expert, slot in slots.items())

    def forward(self, ids: torch.Tensor) -> None:
        """One pass: every slot it reads must hold the expert it stands for."""
        tables = self.placement.tables(CPU)
        slots = tables.slots(ids)
        for expert, slot in zip(ids.flatten().tolist(), slots.flatten().tolist(), strict=True):
            assert slot == EMPTY or self.resident.held[slot] == expert
        self.statistics.count(ids)


def updater_of(*layers: Layer, interval: int = 1, ranks=ALONE) -> BackgroundUpdater:
    context = SimpleNamespace(
        options=HybridOptions(update_interval=interval),
        ranks=ranks,
        device=CPU,
        copies=CopyWorker(backend_of(CPU)),
    )
    return BackgroundUpdater(context, layers)


def skewed(layer: int, topic: int = 0) -> torch.Tensor:
    """How likely each expert is to be chosen: a power law over an order of the layer's own."""
    order = torch.randperm(EXPERTS, generator=torch.Generator().manual_seed(100 * topic + layer))
    return (1.0 + order) ** -1.2


def routed(likelihood: torch.Tensor, tokens: int, generator: torch.Generator) -> torch.Tensor:
    return torch.multinomial(likelihood.expand(tokens, EXPERTS), TOP_K, generator=generator)


def serve(layers, likelihoods, updater, steps, generator) -> list[tuple[int, int]]:
    """(hits, uses) of these steps, per layer; between two steps a copy has time to finish."""
    before = [layer.statistics.hits(layer.placement.tables(CPU)) for layer in layers]
    for _ in range(steps):
        updater.begin_step()
        for layer, likelihood in zip(layers, likelihoods, strict=True):
            layer.forward(routed(likelihood, 8, generator))
        wait_for_copy(updater)
    after = [layer.statistics.hits(layer.placement.tables(CPU)) for layer in layers]
    return [(h1 - h0, u1 - u0) for (h0, u0), (h1, u1) in zip(before, after, strict=True)]


def hit_rate(counted: list[tuple[int, int]]) -> float:
    return sum(hits for hits, _ in counted) / sum(uses for _, uses in counted)


def best_static_hit_rate(counts: list[torch.Tensor]) -> float:
    best = sum(int(uses.sort(descending=True).values[:CAPACITY].sum()) for uses in counts)
    return best / sum(int(uses.sum()) for uses in counts)


def uses_since(layers: list[Layer], before: list[torch.Tensor]) -> list[torch.Tensor]:
    return [layer.statistics.totals() - old for layer, old in zip(layers, before, strict=True)]


def test_updates_raise_the_hit_rate_of_a_skewed_load_to_that_of_the_best_placement():
    generator = torch.Generator().manual_seed(1)
    layers = [Layer(i) for i in range(4)]
    likelihoods = [skewed(i) for i in range(4)]
    updater = updater_of(*layers, interval=20)
    at_first = hit_rate(serve(layers, likelihoods, updater_of(*layers, interval=0), 50, generator))
    serve(layers, likelihoods, updater, 100, generator)
    before = [layer.statistics.totals() for layer in layers]
    reached = hit_rate(serve(layers, likelihoods, updater, 300, generator))
    best = best_static_hit_rate(uses_since(layers, before))
    assert at_first < 0.7 * best, "the load is skewed, and the first placement knows nothing of it"
    assert reached > 0.95 * best


def test_updates_follow_a_change_of_topic():
    generator = torch.Generator().manual_seed(3)
    layers = [Layer(0)]
    updater = updater_of(*layers, interval=10)
    serve(layers, [skewed(0)], updater, 200, generator)
    serve(layers, [skewed(0, topic=1)], updater, 200, generator)
    before = [layers[0].statistics.totals()]
    reached = hit_rate(serve(layers, [skewed(0, topic=1)], updater, 200, generator))
    assert reached > 0.95 * best_static_hit_rate(uses_since(layers, before))


def test_bytes_are_those_of_the_experts_that_entered_and_of_no_other():
    generator = torch.Generator().manual_seed(4)
    layer = Layer()
    updater = updater_of(layer, interval=5)
    entered, held = 0, set(layer.placement.current.experts)
    for _ in range(200):
        serve([layer], [skewed(0)], updater, 1, generator)
        if layer.placement.current.count == CAPACITY:
            entered += len(set(layer.placement.current.experts) - held)
            held = set(layer.placement.current.experts)
    assert entered > 0
    assert updater.figures.experts_moved == entered
    assert updater.figures.bytes_copied == entered * BYTES


def test_an_unchanged_load_moves_nothing():
    layer = Layer()
    updater = updater_of(layer)
    for _ in range(5):
        updater.begin_step()
        layer.forward(torch.arange(TOP_K).view(1, TOP_K))
    assert (layer.placement.current.version, updater.figures.experts_moved) == (0, 0)


def test_a_load_without_favourites_copies_hardly_anything():
    """Chance alone always makes some expert look better than another; each swap would cost a copy."""
    layer = Layer()
    updater = updater_of(layer, interval=5)
    generator = torch.Generator().manual_seed(6)
    serve([layer], [torch.ones(EXPERTS)], updater, 100, generator)
    settled = updater.figures.experts_moved
    serve([layer], [torch.ones(EXPERTS)], updater, 200, generator)
    plans = 200 / 5
    assert updater.figures.experts_moved - settled < plans


def test_no_pass_reads_a_slot_that_is_being_written():
    layer = Layer()
    layer.forward(FAVOURITES)
    updater = updater_of(layer)
    layer.resident.go.clear()
    updater.begin_step()
    assert layer.resident.started.wait(30)
    assert GARBAGE in layer.resident.held
    for _ in range(3):
        updater.begin_step()
        layer.forward(torch.arange(EXPERTS).view(-1, TOP_K))
    assert layer.placement.current.count == CAPACITY - TOP_K, "the CPU serves who left and who enters"
    layer.resident.go.set()
    wait_for_copy(updater)
    layer.forward(torch.arange(EXPERTS).view(-1, TOP_K))
    updater.begin_step()
    layer.forward(torch.arange(EXPERTS).view(-1, TOP_K))
    assert {20, 21, 22, 23} <= set(layer.placement.current.experts)


def test_after_a_failed_copy_the_rest_of_its_plan_is_dropped():
    """It was made with counts of then; what failed once would fail once more for each layer."""
    layers = [Layer(0), Layer(1)]
    updater = updater_of(*layers, interval=3)
    for layer in layers:
        layer.forward(FAVOURITES)
    layers[0].resident.full = True
    for _ in range(3):
        updater.begin_step()
    wait_for_copy(updater)
    for _ in range(2):
        updater.begin_step()
        wait_for_copy(updater)
    assert not layers[1].resident.started.is_set()
    assert layers[1].placement.current.count == CAPACITY


class _NotThereYet:
    """The event behind copies that the device has still to do; notes what was current when it was waited
    for.
    """

    def __init__(self, layer: Layer) -> None:
        self._layer = layer
        self.seen: list[frozenset[int]] = []

    def wait(self) -> None:
        self.seen.append(frozenset(self._layer.placement.current.experts))


def test_a_pass_waits_for_the_copies_before_it_uses_their_slots():
    layer = Layer()
    layer.forward(FAVOURITES)
    updater = updater_of(layer)
    event = _NotThereYet(layer)
    updater._context.copies = SimpleNamespace(start=lambda job: _done((job(), event)))
    updater.begin_step()
    assert event.seen == []
    updater.begin_step()
    (before,) = event.seen
    assert not before & {20, 21, 22, 23} and {20, 21, 22, 23} <= set(layer.placement.current.experts)


def _done(result: object) -> Future:
    future: Future = Future()
    future.set_result(result)
    return future


def test_uses_are_hits_of_the_placement_under_which_they_were_computed():
    layer = Layer()
    layer.forward(torch.arange(CAPACITY).view(-1, TOP_K))  # all on the device
    layer.forward(FAVOURITES)  # none
    updater = updater_of(layer)
    for _ in range(2):
        updater.begin_step()
        wait_for_copy(updater)
    assert set(layer.placement.current.experts) != set(range(CAPACITY)), "nothing moved"
    assert layer.statistics.hits(layer.placement.tables(CPU)) == (CAPACITY, CAPACITY + FAVOURITES.numel())


def test_passes_and_copies_run_side_by_side_without_a_wrong_read():
    generator = torch.Generator().manual_seed(5)
    layers = [Layer(i) for i in range(3)]
    updater = updater_of(*layers)
    for step in range(300):
        updater.begin_step()
        for layer in layers:
            layer.forward(routed(skewed(layer.layer_idx, topic=step // 30), 4, generator))
    assert updater.figures.experts_moved > 3 * CAPACITY


def test_only_one_layer_is_without_experts_at_any_time():
    layers = [Layer(i) for i in range(3)]
    for layer in layers:
        layer.forward(FAVOURITES)
    updater = updater_of(*layers, interval=1)
    for _ in range(4):
        updater.begin_step()
        assert sum(layer.placement.current.count < CAPACITY for layer in layers) <= 1
        wait_for_copy(updater)
    assert [layer.placement.current.count for layer in layers] == [CAPACITY] * 3
    assert updater.figures.updates == 3


def test_a_copy_that_fails_leaves_the_experts_to_the_cpu_and_is_made_up_for_later(caplog):
    layer = Layer()
    layer.forward(FAVOURITES)
    updater = updater_of(layer, interval=2)
    layer.resident.full = True
    updater.begin_step()
    updater.begin_step()
    wait_for_copy(updater)
    updater.begin_step()
    assert "moving 4 experts to the device failed" in caplog.text
    assert layer.placement.current.count == CAPACITY - TOP_K
    layer.forward(torch.arange(EXPERTS).view(-1, TOP_K))
    assert updater.figures.bytes_copied == 0
    layer.resident.full = False
    for _ in range(3):
        updater.begin_step()
        wait_for_copy(updater)
    layer.forward(torch.arange(EXPERTS).view(-1, TOP_K))
    assert layer.placement.current.count == CAPACITY


def test_after_a_layerwise_prefill_the_best_experts_stay_without_a_byte_over_the_bus():
    layer = Layer()
    layer.forward(FAVOURITES)
    updater = updater_of(layer, interval=0)
    updater.update_from_full_layer(layer, ListedExperts(range(EXPERTS)))
    layer.forward(torch.arange(EXPERTS).view(-1, TOP_K))
    assert {20, 21, 22, 23} <= set(layer.placement.current.experts)
    assert (updater.figures.experts_moved, updater.figures.bytes_copied) == (4, 0)
    updater.begin_step()
    assert layer.placement.current.count == CAPACITY


def test_a_prefill_leaves_the_slots_alone_that_are_being_written():
    layer = Layer()
    layer.forward(FAVOURITES)
    updater = updater_of(layer)
    layer.resident.go.clear()
    updater.begin_step()
    version = layer.placement.current.version
    updater.update_from_full_layer(layer, ListedExperts(range(EXPERTS)))
    assert layer.placement.current.version == version
    layer.resident.go.set()
    wait_for_copy(updater)
    updater.begin_step()
    layer.forward(torch.arange(EXPERTS).view(-1, TOP_K))


def test_a_plan_made_before_a_prefill_does_not_bring_an_expert_twice():
    first, second = Layer(0), Layer(1)
    for layer in (first, second):
        layer.forward(FAVOURITES)
    updater = updater_of(first, second)
    updater.begin_step()  # the second layer waits for its turn
    updater.update_from_full_layer(second, ListedExperts(range(EXPERTS)))
    for _ in range(3):
        wait_for_copy(updater)
        updater.begin_step()
        second.forward(torch.arange(EXPERTS).view(-1, TOP_K))
    assert updater.figures.experts_moved == 8


class ThreadRanks:
    """Ranks that are threads of this process."""

    def __init__(self, rank: int, size: int, meeting: threading.Barrier, board: list) -> None:
        self.rank, self.size = rank, size
        self._meeting, self._board = meeting, board

    def _exchange(self, value):
        self._board[self.rank] = value
        self._meeting.wait(30)
        values = list(self._board)
        self._meeting.wait(30)
        return values

    def minimum(self, value: int) -> int:
        return min(self._exchange(value))

    def broadcast(self, value):
        return self._exchange(value)[0]


@pytest.mark.parametrize("failing", [False, True])
def test_ranks_switch_at_the_same_step_though_one_is_slower_routes_otherwise_or_fails(failing):
    meeting, board = threading.Barrier(2), [None, None]
    start_slow_rank = threading.Event()

    def serve_rank(rank: int) -> list[tuple[int, ...]]:
        layer = Layer()
        updater = updater_of(layer, ranks=ThreadRanks(rank, 2, meeting, board))
        if rank == 1:
            layer.resident.go = start_slow_rank
            layer.resident.full = failing
        # Rank 1's router chose one expert more often.
        layer.forward(FAVOURITES + torch.tensor([0, 0, 0, rank]))
        placements = []
        for step in range(8):
            if step == 4:
                start_slow_rank.set()
            if step > 4:
                wait_for_copy(updater)
            updater.begin_step()
            layer.forward(torch.arange(EXPERTS).view(-1, TOP_K))
            placements.append(layer.placement.current.expert_of_slot)
        return placements

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(serve_rank, range(2))
    assert first == second
    assert len(set(first[:4])) == 1, "nobody switches before the slow rank has its experts"
    assert (set(first[-1]) >= {20, 21, 22, 23}) != failing
