"""Layerwise prefill: whole layers on the device, whatever happens around them."""

from __future__ import annotations

import logging
import threading
from typing import ClassVar

import pytest
import torch
from format_support import METHODS
from hybrid_models import (
    DECODER_LAYERS,
    EXPERTS,
    MOE_LAYERS,
    PROMPT,
    Engine,
    Reference,
    assert_close,
    expert_weights,
    prompt,
)

from kt_kernel.hybrid.options import HybridOptions
from kt_kernel.hybrid.torch_experts import TorchDeviceExperts

OPTIONS = HybridOptions(prefill_threshold=PROMPT)
FULL_ROOM = EXPERTS  # capacity of a slot for a whole layer
COLD = EXPERTS - 1  # experts to copy from the host, if one is resident


def _masks(*experts: int) -> torch.Tensor:
    masks = torch.zeros(DECODER_LAYERS, EXPERTS, dtype=torch.bool)
    masks[:, list(experts)] = True
    return masks


def _check_pass(engine: Engine, decoder, reference: Reference, expected_decoder, chunk: torch.Tensor) -> None:
    engine.model.begin_step()
    reference.on_device = engine.placements()
    assert_close(decoder.forward(chunk), expected_decoder.forward(chunk))


def _check_prompts(engine: Engine, reference: Reference, *seeds: int) -> None:
    for seed in seeds:
        _check_pass(engine, engine.decoder(), reference, reference.decoder(), prompt(seed))


# ---- what is copied ------------------------------------------------------------------------------


def test_only_cold_experts_come_from_the_host():
    with Engine(_masks(1, 5), OPTIONS) as engine:
        _check_prompts(engine, Reference(threshold=PROMPT), 1)
        figures = engine.model.report()
        per_expert = engine.layers[0].encoding.bytes
        assert figures["bytes"]["prefill"] == len(MOE_LAYERS) * (EXPERTS - 2) * per_expert
        assert not engine.cpu_runs


class _OfAnotherFormat(TorchDeviceExperts):
    """Rooms for whole layers are unquantised, say, and the resident experts are not."""

    def takes_slots_of(self, source):
        return False

    def copy_slot(self, slot, source, source_slot):
        raise AssertionError("copied from a slot of another format")


def test_resident_experts_of_another_format_come_from_the_host_too():
    with Engine(_masks(1, 5), OPTIONS, device_experts=_OfAnotherFormat) as engine:
        _check_prompts(engine, Reference(threshold=PROMPT), 1)
        copied = engine.model.report()["bytes"]["prefill"]
        assert copied == len(MOE_LAYERS) * EXPERTS * engine.layers[0].encoding.bytes


def test_a_layer_that_a_slot_still_holds_is_not_copied_again():
    """After a pass the slots hold the last two layers; the next pass copies the others, and then these."""
    with Engine(_masks(), OPTIONS) as engine:
        _check_prompts(engine, Reference(threshold=PROMPT), 1, 2, 3)
        copied = engine.model.report()["bytes"]["prefill"] / EXPERTS / engine.layers[0].encoding.bytes
        assert copied == 3 * len(MOE_LAYERS)
        assert engine.model.prefill.chunks == 3


def test_layers_that_are_on_the_device_anyway_need_no_slot():
    masks = _masks()
    masks[list(MOE_LAYERS[1:])] = True
    with Engine(masks, OPTIONS) as engine:
        _check_prompts(engine, Reference(threshold=PROMPT), 1, 2)
        copied = engine.model.report()["bytes"]["prefill"]
        assert copied == EXPERTS * engine.layers[0].encoding.bytes  # layer 0, once


@pytest.mark.parametrize("method", [*METHODS, "LLAMAFILE"])
def test_every_method_can_be_prefilled(method):
    """The answer is that of the decoded checkpoint, with and without the CPU."""
    for threshold in (PROMPT, 0):
        options = HybridOptions(prefill_threshold=threshold)
        with Engine(_masks(2), options, method=method) as engine:
            reference = Reference(threshold=threshold, method=method)
            decoder, expected_decoder = engine.decoder(), reference.decoder()
            for chunk in (prompt(1), prompt(1)[:1]):
                _check_pass(engine, decoder, reference, expected_decoder, chunk)


# ---- copying while computing ---------------------------------------------------------------------


class _Watched(TorchDeviceExperts):
    """A whole layer computes only when the next one has been copied: without overlap it waits in vain."""

    changed = threading.Condition()
    stored = computed = 0

    def store(self, slot, tensors):
        with self.changed:
            _Watched.stored += 1
            self.changed.notify_all()
        return super().store(slot, tensors)

    def compute(self, hidden, slots, weights):
        with self.changed:
            _Watched.computed += 1
            wanted = EXPERTS * min(self.computed + 1, len(MOE_LAYERS))
            assert self.changed.wait_for(lambda: self.stored >= wanted, 60), "nothing is copied meanwhile"
        return super().compute(hidden, slots, weights)


def test_the_next_layer_is_copied_while_one_computes():
    _Watched.stored = _Watched.computed = 0
    with Engine(_masks(), OPTIONS, device_experts=_Watched) as engine:
        _check_prompts(engine, Reference(threshold=PROMPT), 1)
        assert _Watched.computed == len(MOE_LAYERS)


# ---- passes that end early -----------------------------------------------------------------------


class _GivenUp(Exception):
    pass


@pytest.mark.parametrize("layers_run", [0, 1, 2, 3])
@pytest.mark.parametrize("tells", ["tells", "does_not_tell"])
def test_a_pass_that_is_given_up_does_not_disturb_the_next(layers_run, tells):
    with Engine(_masks(0), OPTIONS, max_deferred=1) as engine:
        reference = Reference(1, PROMPT)
        for seed in range(3):
            decoder = engine.decoder()
            forwards = [0]
            inner = decoder._experts

            def stops(index, *call, inner=inner, forwards=forwards):
                if forwards[0] == layers_run:
                    raise _GivenUp
                forwards[0] += 1
                return inner(index, *call)

            decoder._experts = stops
            with pytest.raises(_GivenUp):
                decoder.forward(prompt(100 + seed))
            if tells == "tells":
                _check_prompts(engine, reference, seed)
            else:
                reference.on_device = engine.placements()
                chunk = prompt(seed)
                assert_close(engine.decoder().forward(chunk), reference.decoder().forward(chunk))


def test_what_a_split_layer_deferred_is_added_by_a_prefilled_one():
    with Engine(_masks(0, 3), OPTIONS, max_deferred=2) as engine:
        reference = Reference(2, PROMPT)
        reference.prefilled = MOE_LAYERS[1:]
        reference.on_device = engine.placements()
        decoder = engine.decoder()
        experts = decoder._experts

        def first_layer_split(index: int, *call: torch.Tensor) -> torch.Tensor:
            engine.model.prefill.threshold = 0 if index == MOE_LAYERS[0] else PROMPT
            return experts(index, *call)

        decoder._experts = first_layer_split
        assert_close(decoder.forward(prompt(1)), reference.decoder().forward(prompt(1)))
        assert engine.cpu_runs == reference.cpu_runs and len(engine.cpu_runs) == 2


def test_long_and_short_prompts_take_turns():
    with Engine(_masks(0, 3), OPTIONS, max_deferred=2) as engine:
        reference = Reference(2, PROMPT)
        decoder, expected_decoder = engine.decoder(), reference.decoder()
        for seed, length in enumerate([PROMPT, 1, PROMPT - 1, PROMPT + 3, 1, 1, 2 * PROMPT]):
            _check_pass(engine, decoder, reference, expected_decoder, prompt(seed, length))
        assert engine.cpu_runs == reference.cpu_runs
        assert engine.model.prefill.chunks == 3


# ---- short of memory -----------------------------------------------------------------------------


class _Short(TorchDeviceExperts):
    """Room for whole layers runs out as `fails` says: at the n-th room, store or computation."""

    fails: ClassVar[dict[str, int]] = {}
    error: ClassVar[Exception] = torch.OutOfMemoryError("no memory")

    @classmethod
    def use(cls, what: str) -> None:
        if what in cls.fails:
            cls.fails[what] -= 1
            if cls.fails[what] < 0:
                del cls.fails[what]
                raise cls.error

    def __init__(self, capacity, *rest):
        super().__init__(capacity, *rest)
        self._full = capacity == FULL_ROOM
        if self._full:
            self.use("room")

    def store(self, slot, tensors):
        if self._full:
            self.use("store")
        return super().store(slot, tensors)

    def compute(self, hidden, slots, weights):
        if self._full:
            self.use("compute")
        return super().compute(hidden, slots, weights)


def test_a_cpu_that_plays_the_device_is_out_of_memory_in_its_own_words(monkeypatch):
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    monkeypatch.setattr(_Short, "error", caught.value)
    with Engine(_masks(4), OPTIONS, device_experts=_Short) as engine:
        for fallbacks, what in enumerate(("room", "store", "compute"), start=1):
            _Short.fails = {what: 0}
            engine.model.begin_step()
            engine.decoder().forward(prompt(1))
            assert engine.model.prefill.fallbacks == fallbacks


@pytest.mark.parametrize("max_deferred", [0, 2])
@pytest.mark.parametrize(
    "fails",
    [{"room": 0}, {"room": 1}, {"store": 0}, {"store": COLD + 3}, {"compute": 0}, {"compute": 2}],
    ids=str,
)
def test_short_memory_means_the_split_for_this_prompt_and_is_said_once(fails, max_deferred, caplog):
    with Engine(_masks(4), OPTIONS, max_deferred, device_experts=_Short) as engine:
        for number, seed in enumerate((1, 2), start=1):
            _Short.fails = dict(fails)
            reference = Reference(max_deferred, PROMPT)
            engine.cpu_runs.clear()
            with caplog.at_level(logging.WARNING):
                engine.model.begin_step()
                logits = engine.decoder().forward(prompt(seed))
            assert not _Short.fails
            assert engine.model.prefill.fallbacks == number
            (what, count), *_ = fails.items()
            whole_layers = {"room": 0, "store": count // COLD, "compute": count}[what]
            reference.prefilled = MOE_LAYERS[:whole_layers]
            reference.on_device = engine.placements()
            assert_close(logits, reference.decoder().forward(prompt(seed)))
            assert engine.cpu_runs == reference.cpu_runs
        said = [record for record in caplog.records if "not enough free memory" in record.getMessage()]
        assert len(said) == 1
        _check_prompts(engine, Reference(max_deferred, PROMPT), 5)  # memory is there again
        assert engine.model.prefill.fallbacks == 2


def test_slots_are_freed_when_the_device_has_done_with_them():
    with Engine(_masks(4), OPTIONS, device_experts=_Short) as engine:
        slots_at_wait = []
        prefill = engine.model.prefill
        engine.model.backend.synchronize = lambda: slots_at_wait.append(len(prefill._slots))
        _Short.fails = {"compute": 1}
        engine.model.begin_step()
        engine.decoder().forward(prompt(1))
        assert (slots_at_wait, len(prefill._slots)) == ([2], 0)


def test_a_pass_that_nobody_announced_tries_again():
    with Engine(_masks(4), OPTIONS, device_experts=_Short) as engine:
        _Short.fails = {"room": 0}
        reference = Reference(threshold=PROMPT)
        reference.on_device = engine.placements()
        for seed in (1, 2):
            assert_close(engine.decoder().forward(prompt(seed)), reference.decoder().forward(prompt(seed)))
        assert (engine.model.prefill.chunks, engine.model.prefill.fallbacks) == (2, 1)


@pytest.mark.parametrize("fails", [{}, {"room": 1}], ids=["enough", "short"])
def test_slots_can_be_made_before_the_first_prompt(fails, caplog):
    with Engine(_masks(4), OPTIONS, device_experts=_Short) as engine:
        _Short.fails = dict(fails)
        with caplog.at_level(logging.WARNING):
            engine.model.prepare()
        assert not _Short.fails
        assert len(caplog.records) == len(fails)
        assert engine.model.prefill.fallbacks == 0
        _Short.fails = {} if fails else {"room": 0}  # made already, they are not made again
        _check_prompts(engine, Reference(threshold=PROMPT), 1, 2)
        assert engine.model.prefill.fallbacks == 0
        assert bool(_Short.fails) == (not fails)
        _Short.fails = {}


@pytest.mark.parametrize("masks", [_masks(), _masks(*range(EXPERTS))], ids=["no slots", "all resident"])
@pytest.mark.parametrize("options", [HybridOptions(), OPTIONS], ids=["off", "on"])
def test_there_may_be_nothing_to_prepare(options, masks):
    with Engine(masks, options) as engine:
        engine.model.prepare()
        _check_prompts(engine, Reference(threshold=options.prefill_threshold), 1)


class _Broken(TorchDeviceExperts):
    broken = True

    def store(self, slot, tensors):
        if self.capacity == FULL_ROOM and self.broken:
            raise RuntimeError("the device fell off the bus")
        return super().store(slot, tensors)


def test_what_goes_wrong_while_copying_is_raised_by_the_pass_and_the_next_one_works():
    _Broken.broken = True
    with Engine(_masks(4), OPTIONS, device_experts=_Broken) as engine:
        engine.model.begin_step()
        with pytest.raises(RuntimeError, match="fell off the bus"):
            engine.decoder().forward(prompt(1))
        _Broken.broken = False
        _check_prompts(engine, Reference(threshold=PROMPT), 1)
        assert engine.model.prefill.fallbacks == 0


# ---- with updates --------------------------------------------------------------------------------


def test_after_a_prefilled_layer_its_busiest_experts_are_resident():
    options = HybridOptions(prefill_threshold=PROMPT, update_after_prefill=True)
    with Engine(_masks(6, 7), options) as engine:
        _check_prompts(engine, Reference(threshold=PROMPT), 1)
        for layer in engine.layers.values():
            uses = layer.statistics.totals()
            resident = list(layer.placement.current.experts)
            cold = [expert for expert in range(EXPERTS) if expert not in resident]
            assert uses[resident].min() >= uses[cold].max()
            gate, up, _ = expert_weights(layer.layer_idx)
            for expert in resident:
                slot = layer.placement.current.slot(expert)
                assert torch.equal(layer.resident.w13[slot], torch.cat([gate[expert], up[expert]]).float())
        assert engine.model.report()["bytes"]["update"] == 0
        reference = Reference(threshold=PROMPT)
        _check_pass(engine, engine.decoder(), reference, reference.decoder(), prompt(1)[:1])
