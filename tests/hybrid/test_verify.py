"""Risk: a layer that computes wrongly is not noticed, or a right one is called wrong."""

from __future__ import annotations

import pytest
import torch
from hybrid_models import DECODER_LAYERS, EXPERTS, MOE_LAYERS, PROMPT, Engine, prompt

from kt_kernel.errors import ConfigurationError
from kt_kernel.hybrid.options import HybridOptions
from kt_kernel.hybrid.verify import Computed
from kt_kernel.integrations.options import ExpertOptions


def masks(*on_device: int) -> torch.Tensor:
    of_layers = torch.zeros(DECODER_LAYERS, EXPERTS, dtype=torch.bool)
    of_layers[:, list(on_device)] = True
    return of_layers


def run(engine: Engine, passes: int = 6) -> None:
    decoder = engine.decoder()
    for seed in range(passes):
        engine.model.begin_step()
        decoder.forward(prompt(seed, PROMPT if seed % 2 else 1))
        engine.model.verifier.wait()


@pytest.mark.parametrize("method", ["BF16", "GPTQ_INT4", "NVFP4"])
@pytest.mark.parametrize("on_device", [(), (1, 6), range(EXPERTS)], ids=["none", "some", "all"])
def test_right_layers_are_called_right(method, on_device):
    with Engine(masks(*on_device), HybridOptions(verify_every=1), 0, method) as engine:
        run(engine)
        figures = engine.model.report()["verify"]
    assert figures["checked"] >= len(MOE_LAYERS) and figures["wrong"] == 0


def test_a_slot_that_holds_another_expert_is_noticed(caplog):
    # One call of a pass at most, of another layer each time.
    with Engine(masks(*range(EXPERTS)), HybridOptions(verify_every=len(MOE_LAYERS) + 1)) as engine:
        resident = engine.layers[MOE_LAYERS[0]].resident
        resident.w2.copy_(resident.w2.roll(1, 0))
        run(engine, passes=len(MOE_LAYERS) + 1)
        figures = engine.model.report()["verify"]
    assert (figures["wrong"], figures["checked"]) == (1, len(MOE_LAYERS)), "the other layers are right"
    assert f"layer {MOE_LAYERS[0]} computed a token wrongly" in caplog.text


def test_what_is_no_number_is_noticed():
    with Engine(masks(), HybridOptions(verify_every=1)) as engine:
        layer = engine.layers[MOE_LAYERS[0]]
        hidden = torch.ones(1, layer.wrapper.hidden_size)
        ids, weights = torch.tensor([[0, 1, 2]]), torch.ones(1, 3)
        engine.model.verifier.look(layer, Computed(hidden, ids, weights, hidden * float("nan")))
        engine.model.verifier.wait()
        assert engine.model.verifier.figures.wrong == 1


def test_a_check_that_fails_is_counted_and_told(caplog):
    with Engine(masks(), HybridOptions(verify_every=1)) as engine:
        layer, verifier = engine.layers[MOE_LAYERS[0]], engine.model.verifier
        hidden = torch.ones(1, layer.wrapper.hidden_size)
        narrow = Computed(hidden[:, :-1], torch.tensor([[0, 1, 2]]), torch.ones(1, 3), hidden)
        verifier.look(layer, narrow)
        verifier.wait()
        assert (verifier.figures.failed, verifier.figures.checked) == (1, 0)
        assert "could not be verified" in caplog.text


def test_only_every_so_many_calls_are_looked_at():
    with Engine(masks(), HybridOptions(verify_every=7)) as engine:
        run(engine, passes=7)
        figures = engine.model.report()["verify"]
    assert figures["checked"] + figures["skipped"] == 7 * len(MOE_LAYERS) // 7


def test_deferral_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="verify compares what a layer gives"):
        ExpertOptions(weight_path=tmp_path, verify=10, max_deferred_experts_per_token=2)
