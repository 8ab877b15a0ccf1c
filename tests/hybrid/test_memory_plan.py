"""The memory that a model says it takes is the memory that it took."""

from __future__ import annotations

import logging

import pytest
import torch
from hybrid_models import EXPERTS, HIDDEN, INTERMEDIATE, MOE_LAYERS, Engine, all_zero_masks

from kt_kernel.calls.buffers import BufferCache, BufferKey
from kt_kernel.hybrid.memory_plan import DEVICE, HOST, MemoryRow, table
from kt_kernel.hybrid.options import HybridOptions

SLOT = 3 * HIDDEN * INTERMEDIATE * 4  # float32


def plan(engine: Engine) -> dict[str, MemoryRow]:
    """Of experts on their way, the row of the host."""
    return {row.what: row for row in engine.model.memory_plan()}


def test_a_model_without_experts_on_the_device_takes_host_memory_only():
    with Engine(all_zero_masks(), HybridOptions()) as engine:
        rows = plan(engine)
    assert {row.where for row in rows.values()} == {HOST}
    # bf16 weights and what packing adds
    weights = len(MOE_LAYERS) * EXPERTS * 3 * HIDDEN * INTERMEDIATE * 2
    assert weights <= rows["CPU experts, packed"].bytes < 2 * weights


def test_every_purpose_has_its_bytes_once_it_is_prepared(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    masks = all_zero_masks()
    masks[0, :3] = masks[3, :2] = True
    with Engine(masks, HybridOptions(prefill_threshold=4, miss_policy="auto")) as engine:
        before = plan(engine)
        engine.model.prepare()
        rows = plan(engine)
        staging = [row for row in engine.model.memory_plan() if row.what == "staging of copied experts"]
        images = engine.layers[0].encoding.bytes
    assert rows["resident experts"] == MemoryRow("resident experts", DEVICE, 5 * SLOT)
    assert "slots of layerwise prefill" not in before
    assert rows["slots of layerwise prefill"].bytes == 2 * EXPERTS * SLOT
    assert rows["slots of fetched experts"].bytes == min(8, EXPERTS) * SLOT
    (on_device,) = (row for row in staging if row.where == DEVICE)
    assert on_device.bytes >= 2 * images
    assert rows["staging of copied experts"].where == HOST
    # two users of as many buffers, at least two each
    assert rows["staging of copied experts"].bytes >= 2 * 2 * images


def test_the_table_is_logged_when_a_model_is_prepared_and_reported_later(caplog):
    with (
        caplog.at_level(logging.INFO, "kt_kernel.hybrid.model"),
        Engine(all_zero_masks(), HybridOptions(prefill_threshold=4)) as engine,
    ):
        engine.model.prepare()
        report = engine.model.report()["memory"]
        assert table(engine.model.memory_plan()) in caplog.text
    assert {"what": "slots of layerwise prefill", "where": DEVICE, "bytes": 2 * EXPERTS * SLOT} in report


def test_the_table_adds_up_each_place():
    rows = [MemoryRow("a", HOST, 2_000_000), MemoryRow("b", DEVICE, 500_000), MemoryRow("c", HOST, 1_000_000)]
    lines = [line.split() for line in table(rows).splitlines()]
    assert lines[3:] == [["sum", "host", "3.0", "MB"], ["sum", "device", "0.5", "MB"]]


@pytest.mark.parametrize(("capture", "figure"), [(None, "bytes_of_calls"), (7, "bytes_of_graphs")])
def test_exchange_buffers_count_for_calls_or_for_graphs(capture, figure):
    cache = BufferCache()
    made = []

    def allocate(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        made.append(torch.empty(shape, dtype=dtype))
        return made[-1]

    key = BufferKey(torch.device("cpu"), torch.bfloat16, HIDDEN, 3, 0)
    held = cache.ring(key, 16, allocate, capture)
    taken = sum(tensor.nbytes for tensor in made)
    assert getattr(cache, figure) == taken == held.bytes
    assert cache.bytes_of_calls + cache.bytes_of_graphs == taken
