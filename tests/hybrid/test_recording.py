"""Recording: a step booked to the wrong placement, or a file that the next start cannot read."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from kt_kernel.errors import CallOrderError
from kt_kernel.hybrid.activation import read_activation_counts
from kt_kernel.hybrid.device import backend_of
from kt_kernel.hybrid.recording import DistributionRecorder
from kt_kernel.hybrid.slots import LayerPlacement, Placement
from kt_kernel.hybrid.statistics import LayerStatistics

EXPERTS = 4


def model_of(*layer_idxs: int) -> SimpleNamespace:
    """Layers of four experts; expert 0 of each is on the device."""
    return SimpleNamespace(
        backend=backend_of(torch.device("cpu")),
        layers=[
            SimpleNamespace(
                layer_idx=layer_idx,
                placement=LayerPlacement(Placement(0, (0,), EXPERTS)),
                statistics=LayerStatistics(EXPERTS),
            )
            for layer_idx in layer_idxs
        ],
    )


def forward(model: SimpleNamespace, *ids: int) -> None:
    for layer in model.layers:
        layer.statistics.count(torch.tensor([ids]))


def test_each_step_has_its_own_uses_and_its_own_placement():
    model = model_of(1, 3)
    recorder = DistributionRecorder(model.layers, model.backend, num_layers=4)
    forward(model, 3, 3)  # before recording
    recorder.start()
    recorder.begin_step()
    forward(model, 0, 1)
    recorder.begin_step()
    layer = model.layers[1]
    layer.placement.switch(layer.placement.current.with_slots({0: 2}))
    forward(model, 2, 2)
    recorder.stop()
    forward(model, 3, 3)  # after it
    content = recorder.recorded()
    counts, masks = content["logical_count"], content["gpu_expert_masks"]
    assert counts.shape == masks.shape == (2, 4, EXPERTS)
    assert counts[:, [1, 3]].tolist() == [[[1, 1, 0, 0]] * 2, [[0, 0, 2, 0]] * 2]
    assert masks[0, [1, 3]].int().tolist() == [[1, 0, 0, 0], [1, 0, 0, 0]]
    assert masks[1, [1, 3]].int().tolist() == [[1, 0, 0, 0], [0, 0, 1, 0]]
    assert not counts[:, [0, 2]].any()
    assert not masks[:, [0, 2]].any()


def test_the_file_is_one_that_the_next_start_reads(tmp_path):
    model = model_of(0, 1)
    recorder = DistributionRecorder(model.layers, model.backend, num_layers=2)
    recorder.start()
    for _ in range(3):
        recorder.begin_step()
        forward(model, 1, 2)
    path = recorder.save(tmp_path / "new folder")
    assert read_activation_counts(path, 2, EXPERTS).tolist() == [[0, 3, 3, 0]] * 2
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_memory_is_bounded_and_the_last_steps_are_kept():
    model = model_of(0)
    recorder = DistributionRecorder(model.layers, model.backend, num_layers=1, steps=2)
    recorder.start()
    for expert in (0, 1, 2):
        recorder.begin_step()
        forward(model, expert)
    assert recorder.recorded()["logical_count"][:, 0].tolist() == [[0, 1, 0, 0], [0, 0, 1, 0]]


def test_nothing_is_kept_of_an_earlier_recording():
    model = model_of(0)
    recorder = DistributionRecorder(model.layers, model.backend, num_layers=1)
    recorder.start()
    forward(model, 0)
    recorder.stop()
    recorder.start()
    with pytest.raises(CallOrderError, match="no expert distribution was recorded"):
        recorder.recorded()


def test_steps_without_tokens_are_not_recorded():
    model = model_of(0)
    recorder = DistributionRecorder(model.layers, model.backend, num_layers=1)
    recorder.start()
    for _ in range(3):
        recorder.begin_step()
    forward(model, 0)
    assert len(recorder.recorded()["logical_count"]) == 1
