"""Miss policy "auto" on a small model: an expert computed twice or never, or a measurement at each start."""

from __future__ import annotations

import time
from typing import ClassVar

import pytest
import torch
from hybrid_models import (
    ANSWER,
    DECODER_LAYERS,
    MOE_LAYERS,
    Engine,
    Reference,
    answer,
    assert_close,
    expert_weights,
    prompt,
)

from kt_kernel.errors import KTError
from kt_kernel.hybrid import fetch
from kt_kernel.hybrid.feed import ExpertFeed
from kt_kernel.hybrid.options import HybridOptions
from kt_kernel.hybrid.placement import device_expert_masks
from kt_kernel.hybrid.speeds import ExpertSpeeds, seconds_per_expert, write_speeds
from kt_kernel.hybrid.torch_experts import TorchDeviceExperts

AUTO = HybridOptions(miss_policy="auto")
EXPERTS = 8
SEED = 3
QUICK_BUS = ExpertSpeeds((1,), (1.0,), 0.01)
EVEN = ExpertSpeeds((1,), (1.0,), 1.0)
SLOW_BUS = ExpertSpeeds((1,), (1.0,), 1e6)
BYTES_OF_EXPERT = sum(tensor[0].nbytes for tensor in expert_weights(0))  # bf16, as the CPU stores it


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "kt-kernel" / "speeds"


def masks(per_layer: int) -> torch.Tensor:
    total = per_layer * len(MOE_LAYERS)
    return device_expert_masks("uniform", DECODER_LAYERS, MOE_LAYERS, EXPERTS, total)


def with_speeds(monkeypatch, speeds: ExpertSpeeds) -> None:
    monkeypatch.setattr(fetch, "read_speeds", lambda key: speeds)


def note_fetched(engine: Engine) -> dict[int, set[int]]:
    """What the layers fetch in their last call, by layer."""
    noted: dict[int, set[int]] = {}
    plan = engine.model.misses.plan

    def noting(layer, ids):
        planned = plan(layer, ids)
        noted[layer.layer_idx] = set() if planned is None else set(planned._slots)
        return planned

    engine.model.misses.plan = noting
    return noted


@pytest.mark.parametrize("speeds", [QUICK_BUS, EVEN, SLOW_BUS], ids=["quick bus", "even", "slow bus"])
@pytest.mark.parametrize("max_deferred", [0, 1])
def test_every_expert_runs_once_in_the_place_that_was_planned(monkeypatch, speeds, max_deferred):
    with_speeds(monkeypatch, speeds)
    monkeypatch.setattr(fetch, "_SLOTS", 3)
    reference = Reference(max_deferred)
    with Engine(masks(2), AUTO, max_deferred) as engine:
        fetched = note_fetched(engine)
        decoder, expected = engine.decoder(), reference.decoder()
        number = 0
        for chunk in (prompt(SEED), *prompt(SEED + 1).split(1)):
            engine.model.begin_step()
            logits = decoder.forward(chunk)
            reference.on_device = {
                layer: resident | fetched[layer] for layer, resident in engine.placements().items()
            }
            assert_close(logits, expected.forward(chunk))
            number += sum(map(len, fetched.values()))
        assert engine.cpu_runs == reference.cpu_runs
        assert (number > 0) == (speeds is not SLOW_BUS)
        assert engine.model.misses.experts_fetched == number
        assert engine.model.misses.bytes_copied == number * BYTES_OF_EXPERT
        assert all(layer.placement.current.version == 0 for layer in engine.layers.values())


def test_fetching_changes_no_token(monkeypatch):
    with_speeds(monkeypatch, QUICK_BUS)
    expected = answer(Reference().decoder(), prompt(SEED), ANSWER, lambda: None)
    with Engine(masks(1), AUTO) as engine:
        got = answer(engine.decoder(), prompt(SEED), ANSWER, engine.model.begin_step)
        assert engine.model.misses.experts_fetched > 0
    assert got.tokens == expected.tokens


def test_updates_and_prefill_may_move_experts_meanwhile(monkeypatch):
    with_speeds(monkeypatch, EVEN)
    options = HybridOptions(
        miss_policy="auto", prefill_threshold=8, update_after_prefill=True, update_interval=1
    )
    expected = answer(Reference().decoder(), prompt(SEED), ANSWER, lambda: None)
    with Engine(masks(2), options) as engine:
        got = answer(engine.decoder(), prompt(SEED), ANSWER, engine.model.begin_step)
        assert engine.model.updater.figures.experts_moved > 0
    assert got.tokens == expected.tokens


def test_a_machine_is_measured_once(cache, monkeypatch):
    measured = []

    def counting(work):
        measured.append(work)
        return seconds_per_expert(work)

    monkeypatch.setattr(fetch, "seconds_per_expert", counting)
    for _ in range(2):
        with Engine(masks(2), AUTO) as engine:
            for _ in range(2):
                engine.model.begin_step()
                engine.decoder().forward(prompt(SEED))
        at_first = len(measured)
        assert len(list(cache.iterdir())) == 1
    assert 0 < at_first == len(measured)


def test_fetching_is_measured_while_the_cpu_computes(monkeypatch):
    """As in serving: with idle threads it would look many times quicker than it is."""
    fill = ExpertFeed.fill
    measured = []

    def noting(feed, target, slots):
        copied = fill(feed, target, slots)
        before, begin = feed._wrapper.cpu_infer.stats()["calls"], time.monotonic()
        while (busy := feed._wrapper.cpu_infer.stats()["calls"] > before) is False:
            if time.monotonic() - begin > 2:
                break
            time.sleep(0.001)
        measured.append(busy)
        return copied

    with Engine(masks(2), AUTO) as engine:
        monkeypatch.setattr(ExpertFeed, "fill", noting)
        engine.model.begin_step()
        calls = engine.layers[MOE_LAYERS[-1]].wrapper.cpu_infer.stats()["calls"]
        time.sleep(0.05)
        assert engine.layers[MOE_LAYERS[-1]].wrapper.cpu_infer.stats()["calls"] == calls, "it still computes"
    assert measured and all(measured)


def test_speeds_that_were_measured_on_an_idle_cpu_are_measured_again():
    with Engine(masks(2), AUTO) as engine:
        layer = engine.layers[MOE_LAYERS[-1]]
        key = {name: value for name, value in fetch._key(layer).items() if name != "fetched"}
        write_speeds(key, QUICK_BUS)
        engine.model.begin_step()
        assert engine.model.misses._speeds != QUICK_BUS


def test_without_memory_on_the_device_the_cpu_computes_all(monkeypatch, caplog):
    with_speeds(monkeypatch, QUICK_BUS)
    expected = answer(Reference().decoder(), prompt(SEED), ANSWER, lambda: None)
    with Engine(masks(2), AUTO) as engine:

        def no_memory(count):
            raise torch.OutOfMemoryError("the device is full")

        engine.layers[MOE_LAYERS[-1]].new_experts = no_memory
        got = answer(engine.decoder(), prompt(SEED), ANSWER, engine.model.begin_step)
        assert engine.model.misses.experts_fetched == 0
    assert got.tokens == expected.tokens
    assert caplog.text.count("not enough free memory to fetch experts") == 1


class _Full(TorchDeviceExperts):
    """Memory runs out in one place while experts are fetched."""

    where: ClassVar[str | None] = None

    def store(self, slot, tensors):
        self._use("store")
        return super().store(slot, tensors)

    def compute(self, hidden, slots, weights):
        self._use("compute")
        return super().compute(hidden, slots, weights)

    def _use(self, what: str) -> None:
        if self.capacity == EXPERTS and self.where == what:  # not the residents' slots
            raise torch.OutOfMemoryError("the device is full")


@pytest.mark.parametrize("max_deferred", [0, 1])
@pytest.mark.parametrize("where", ["store", "compute"])
def test_memory_that_runs_out_ends_one_pass_and_the_fetching(monkeypatch, caplog, where, max_deferred):
    with_speeds(monkeypatch, QUICK_BUS)
    with Engine(masks(2), AUTO, max_deferred, device_experts=_Full) as engine:
        engine.model.begin_step()
        monkeypatch.setattr(_Full, "where", where)
        with pytest.raises(KTError, match="ran out of memory while it fetched"):
            engine.decoder().forward(prompt(SEED))
        for seed in (SEED, SEED + 1):
            engine.model.begin_step()
            reference = Reference(max_deferred)
            reference.on_device = engine.placements()
            assert_close(engine.decoder().forward(prompt(seed)), reference.decoder().forward(prompt(seed)))
        assert engine.model.misses.plan(engine.layers[MOE_LAYERS[0]], torch.tensor([[0, 1, 2]])) is None
    assert caplog.text.count("ran out of memory while it fetched") == 1


def test_policy_cpu_measures_and_fetches_nothing(cache):
    with Engine(masks(2), HybridOptions(miss_policy="cpu")) as engine:
        engine.model.begin_step()
        engine.decoder().forward(prompt(SEED))
        assert engine.model.misses.experts_fetched == 0
    assert not cache.exists()
