"""One hybrid layer and one model at their edges: bad input, errors in between, the figures."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from hybrid_models import (
    DECODER_LAYERS,
    EXPERTS,
    HIDDEN,
    INTERMEDIATE,
    MOE_LAYERS,
    PROMPT,
    TOP_K,
    Engine,
    Reference,
    assert_close,
    prompt,
    wrappers,
)

from kt_kernel.errors import ConfigurationError, InputError
from kt_kernel.hybrid import fetch
from kt_kernel.hybrid.layer import HybridLayer
from kt_kernel.hybrid.model import HybridModel
from kt_kernel.hybrid.options import HybridOptions
from kt_kernel.hybrid.slots import LayerPlacement, Placement
from kt_kernel.hybrid.torch_experts import TorchDeviceExperts

FIRST = MOE_LAYERS[0]


def _masks(*experts: int) -> torch.Tensor:
    masks = torch.zeros(DECODER_LAYERS, EXPERTS, dtype=torch.bool)
    masks[:, list(experts)] = True
    return masks


def _call(seed: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, HIDDEN, generator=generator)
    weights, ids = torch.rand(tokens, EXPERTS, generator=generator).topk(TOP_K)
    return hidden, ids, weights


def _expected(layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return Reference()._sum(layer, hidden.double(), ids.tolist(), weights.double())


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("impossible", [EXPERTS, 1 << 30, -2])
@pytest.mark.parametrize("experts", [(), (0, 3), range(EXPERTS)], ids=["none", "some", "all"])
def test_impossible_ids_are_an_input_error_and_the_layer_goes_on(impossible, experts):
    with Engine(_masks(*experts), HybridOptions()) as engine:
        layer = engine.layers[FIRST]
        hidden, ids, weights = _call(1, 4)
        ids[2, 1] = impossible
        with pytest.raises(InputError, match=f"layer {FIRST}: topk_ids holds {impossible}, expected"):
            layer.forward(hidden, ids, weights)
        assert layer.statistics.totals().sum() == 0
        call = _call(2, 4)
        assert_close(layer.forward(*call), _expected(FIRST, *call))


def test_more_rows_than_the_cpu_layer_was_made_for():
    with Engine(_masks(0), HybridOptions()) as engine:
        layer = engine.layers[FIRST]
        with pytest.raises(InputError, match="65 tokens, more than chunked_prefill_size"):
            layer.forward(*_call(1, 65))
        call = _call(2, 64)
        assert_close(layer.forward(*call), _expected(FIRST, *call))


@pytest.mark.parametrize("experts", [(), (0, 3), range(EXPERTS)], ids=["none", "some", "all"])
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
def test_skipped_places_and_empty_batches(experts, ids_dtype):
    with Engine(_masks(*experts), HybridOptions()) as engine:
        layer = engine.layers[FIRST]
        hidden, ids, weights = _call(1, 6)
        ids[3] = -1
        ids[0, 1] = -1
        output = layer.forward(hidden, ids.to(ids_dtype), weights)
        assert_close(output, _expected(FIRST, hidden, ids, weights))
        assert not output[3].any()
        assert layer.forward(*(tensor[:0] for tensor in (hidden, ids, weights))).shape == (0, HIDDEN)
        assert layer.statistics.totals().sum() == int((ids >= 0).sum())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_output_is_a_new_tensor_like_hidden(dtype):
    for options in (HybridOptions(), HybridOptions(prefill_threshold=1)):
        with Engine(_masks(0, 3), options) as engine:
            hidden, ids, weights = _call(1, 6)
            output = engine.layers[FIRST].forward(hidden.to(dtype), ids, weights)
            assert output.dtype is dtype and output.data_ptr() != hidden.data_ptr()
            assert_close(output, _expected(FIRST, hidden, ids, weights))


def test_the_factor_is_applied_to_the_cpu_alone():
    """The device's experts multiply by it themselves."""
    wrapper, model = wrappers(0)[FIRST], HybridModel(HybridOptions())

    def room(count: int) -> TorchDeviceExperts:
        return TorchDeviceExperts(count, HIDDEN, INTERMEDIATE, torch.float32, "cpu", wrapper.encoding(1))

    mask = torch.arange(EXPERTS) < 3
    layer = HybridLayer(FIRST, wrapper, room(3), LayerPlacement(Placement.initial(mask)), room, model, 2.5)
    layer.load_residents()
    hidden, ids, weights = _call(1, 6)
    expected = _expected(FIRST, hidden, ids, torch.where(mask[ids], weights, weights * 2.5))
    assert_close(layer.forward(hidden, ids, weights), expected)
    model.close()


# ---- made wrongly --------------------------------------------------------------------------------


def test_tensors_and_placement_must_have_the_same_slots():
    wrapper, model = wrappers(0)[FIRST], HybridModel(HybridOptions())
    placement = LayerPlacement(Placement.initial(torch.arange(EXPERTS) < 3))
    for resident in (None, TorchDeviceExperts(2, HIDDEN, INTERMEDIATE, torch.float32, "cpu")):
        with pytest.raises(ConfigurationError, match=f"layer {FIRST}: .* slots, but the placement has 3"):
            HybridLayer(FIRST, wrapper, resident, placement, lambda count: None, model)
    model.close()


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"prefill_threshold": -1}, "prefill_threshold is -1"),
        ({"update_interval": -5}, "update_interval is -5"),
        ({"miss_policy": "gpu"}, "'gpu' is unknown; use one of cpu, auto"),
    ],
)
def test_impossible_options(values, reason):
    with pytest.raises(ConfigurationError, match=reason):
        HybridOptions(**values)


# ---- errors in between ---------------------------------------------------------------------------


class _Fails(TorchDeviceExperts):
    fails = False

    def compute(self, hidden, slots, weights):
        if self.fails:
            raise RuntimeError("the kernel failed")
        return super().compute(hidden, slots, weights)


@pytest.mark.parametrize("max_deferred", [0, 2])
def test_an_error_of_the_device_while_the_cpu_computes_does_not_reach_the_next_pass(max_deferred, caplog):
    with Engine(_masks(0, 3), HybridOptions(), max_deferred, device_experts=_Fails) as engine:
        for seed, broken in enumerate(MOE_LAYERS):
            engine.model.begin_step()
            engine.layers[broken].resident.fails = True
            with pytest.raises(RuntimeError, match="the kernel failed"):
                engine.decoder().forward(prompt(seed))
            engine.layers[broken].resident.fails = False
            engine.model.begin_step()
            reference = Reference(max_deferred)
            reference.on_device = engine.placements()
            engine.cpu_runs.clear()
            with caplog.at_level(logging.WARNING):
                assert_close(engine.decoder().forward(prompt(9)), reference.decoder().forward(prompt(9)))
            assert engine.cpu_runs == reference.cpu_runs
    assert not caplog.records, "a pass that was told of begins without leftovers"


@pytest.mark.parametrize("options", [{"miss_policy": "auto"}, {"prefill_threshold": 1}], ids=str)
def test_passes_in_and_outside_inference_mode_take_turns(options, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(fetch, "split_misses", lambda tokens_of, *_: tuple(sorted(tokens_of)[:2]))
    options = HybridOptions(update_after_prefill=True, update_interval=1, **options)
    with Engine(_masks(0, 3), options, 2) as engine:
        for seed in range(12):
            mode = torch.inference_mode() if seed % 2 == 0 else torch.no_grad()
            with mode:
                engine.model.begin_step()
                layer, call = engine.layers[MOE_LAYERS[-1]], _call(seed, 5)
                assert_close(layer.forward(*call), _expected(MOE_LAYERS[-1], *call))


def test_a_layer_that_has_become_all_resident_still_adds_what_was_deferred_to_it():
    """With as many slots as experts, updates may fill them all after the layer before chose to defer."""
    masks = _masks(0, 3)
    masks[MOE_LAYERS[1]] = True
    with Engine(masks, HybridOptions(), 2) as engine:
        engine.layers[MOE_LAYERS[1]].wrapper.has_cpu_experts = True
        reference = Reference(2)
        reference._adds_deferred = lambda layer: layer in MOE_LAYERS
        reference.on_device = engine.placements()
        assert_close(engine.decoder().forward(prompt(1)), reference.decoder().forward(prompt(1)))
        assert engine.cpu_runs == reference.cpu_runs


# ---- capture -------------------------------------------------------------------------------------


def test_nothing_is_moved_or_switched_while_a_graph_is_captured(monkeypatch):
    """A graph would repeat what happened once."""
    options = HybridOptions(prefill_threshold=PROMPT, update_interval=1, miss_policy="cpu")
    with Engine(_masks(0, 3), options) as engine:
        monkeypatch.setattr(engine.model.backend, "capturing", lambda: True)
        reference = Reference()
        reference.on_device = engine.placements()
        for seed in range(4):
            engine.model.begin_step()
            assert_close(engine.decoder().forward(prompt(seed)), reference.decoder().forward(prompt(seed)))
        assert engine.placements() == reference.on_device
        assert engine.cpu_runs == reference.cpu_runs
        assert engine.model.prefill.chunks == 0


# ---- figures -------------------------------------------------------------------------------------


def test_the_report_is_plain_values_that_add_up():
    with Engine(_masks(0, 3), HybridOptions(prefill_threshold=PROMPT), 2) as engine:
        before = engine.model.report()
        assert before["hit_rate"] is None
        assert before["layers"][0]["hit_rate"] is None
        engine.model.begin_step()
        engine.decoder().forward(prompt(1, 5))
        figures = engine.model.report()
        json.dumps(figures)
    assert [layer["layer"] for layer in figures["layers"]] == list(MOE_LAYERS)
    assert all(layer["device_experts"] == [0, 3] for layer in figures["layers"])
    assert all(layer["capacity"] == 2 and layer["version"] == 0 for layer in figures["layers"])
    assert all(layer["uses"] == 5 * TOP_K for layer in figures["layers"])
    assert figures["experts"] == EXPERTS * len(MOE_LAYERS) and figures["device_experts"] == 2 * len(
        MOE_LAYERS
    )
    rates = [layer["hit_rate"] for layer in figures["layers"]]
    assert figures["hit_rate"] == pytest.approx(sum(rates) / len(rates)) and 0 < figures["hit_rate"] < 1
    assert figures["bytes"] == {"update": 0, "prefill": 0, "misses": 0} and figures["bytes_copied"] == 0
    assert figures["prefill"] == {"threshold": PROMPT, "chunks": 0, "mixed": 0, "fallbacks": 0}
    assert figures["deferred"] == 2 and figures["miss_policy"] == "cpu"
    cpu = {name: figures["cpu"][name] - before["cpu"][name] for name in ("calls", "seconds", "bytes")}
    assert cpu["calls"] >= len(MOE_LAYERS) and cpu["seconds"] > 0 and cpu["bytes"] > 0
    assert figures["cpu"]["gb_per_s"] > 0
