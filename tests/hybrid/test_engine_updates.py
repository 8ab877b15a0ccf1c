"""Experts move while passes run: no pass may meet a slot being written, or an expert that nobody computes."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from hybrid_models import (
    DECODER_LAYERS,
    EXPERTS,
    PROMPT,
    Engine,
    Reference,
    assert_close,
    prompt,
)

from kt_kernel.hybrid.options import HybridOptions
from kt_kernel.hybrid.torch_experts import TorchDeviceExperts


class _Poisoned(TorchDeviceExperts):
    """A slot holds NaN for as long as it is being written."""

    def store(self, slot, tensors):
        self.w13[slot] = float("nan")
        self.w2[slot] = float("nan")
        time.sleep(0.002)  # long enough for a few layers of a pass
        return super().store(slot, tensors)

    def copy_slot(self, slot, source, source_slot):
        assert not source.w13[source_slot].isnan().any(), "copied from a slot that is being written"
        super().copy_slot(slot, source, source_slot)


def _masks() -> torch.Tensor:
    masks = torch.zeros(DECODER_LAYERS, EXPERTS, dtype=torch.bool)
    masks[:, [6, 7]] = True
    masks[4, :5] = True
    return masks


@pytest.mark.parametrize("max_deferred", [0, 2])
@pytest.mark.parametrize("threshold", [0, PROMPT])
def test_every_pass_is_right_while_experts_move(threshold, max_deferred):
    options = HybridOptions(
        prefill_threshold=threshold, update_after_prefill=bool(threshold), update_interval=1
    )
    with Engine(_masks(), options, max_deferred, device_experts=_Poisoned) as engine:
        versions = set()
        for number in range(60):
            topic = number // 20  # what is asked for changes, and with it which experts are used
            engine.model.begin_step()
            reference = Reference(max_deferred, threshold)
            reference.on_device = engine.placements()
            versions.add(tuple(layer.placement.current.version for layer in engine.layers.values()))
            engine.cpu_runs.clear()
            chunk = prompt(topic, PROMPT if number % 10 == 0 else 1 + number % 3)
            assert_close(
                engine.decoder().forward(chunk), reference.decoder().forward(chunk), f"pass {number}"
            )
            assert engine.cpu_runs == reference.cpu_runs, f"pass {number}"
        figures = engine.model.report()
        assert len(versions) > 2 and figures["experts_moved"] > 0
        assert figures["device_experts"] <= int(_masks()[[0, 1, 3, 4]].sum())
        if not threshold:
            assert figures["bytes"]["update"] >= figures["experts_moved"] * engine.layers[0].encoding.bytes


def test_a_prefill_that_begins_during_an_update_reads_no_slot_that_is_being_written():
    """Both go through one thread: what prefill copies from a slot was there before the update wrote to it."""
    options = HybridOptions(prefill_threshold=PROMPT, update_interval=1)
    with Engine(_masks(), options, device_experts=_Poisoned) as engine:
        for number in range(20):
            for chunk in (prompt(number, 2), prompt(number, 3), prompt(number)):
                engine.model.begin_step()
                reference = Reference(threshold=PROMPT)
                reference.on_device = engine.placements()
                assert_close(
                    engine.decoder().forward(chunk), reference.decoder().forward(chunk), f"pass {number}"
                )
        assert engine.model.report()["experts_moved"] > 0


def _copying_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("kt-copies")}


def test_a_model_may_be_closed_while_experts_move():
    before = _copying_threads()
    with Engine(_masks(), HybridOptions(update_interval=1), device_experts=_Poisoned) as engine:
        for number in range(3):
            engine.model.begin_step()
            engine.decoder().forward(prompt(number, 5))
        assert _copying_threads() > before
    assert _copying_threads() <= before
