"""A load that prefers some experts, on the whole engine: hits, moves and bytes as `report()` gives them."""

from __future__ import annotations

import torch
from hybrid_models import DECODER_LAYERS, EXPERTS, HIDDEN, MOE_LAYERS, TOP_K, Engine, expert_weights

from kt_kernel.hybrid.activation import read_activation_counts
from kt_kernel.hybrid.options import HybridOptions
from kt_kernel.hybrid.placement import device_expert_masks
from kt_kernel.hybrid.recording import DistributionRecorder

SLOTS = 3 * len(MOE_LAYERS)
BYTES_OF_EXPERT = sum(tensor[0].nbytes for tensor in expert_weights(0))  # bf16, as the CPU stores it


def masks(strategy: str, counts: torch.Tensor | None = None) -> torch.Tensor:
    return device_expert_masks(strategy, DECODER_LAYERS, MOE_LAYERS, EXPERTS, SLOTS, counts)


def serve(engine: Engine, steps: int, seed: int) -> None:
    """Passes of two rows; each layer has an order of its own in which it prefers experts."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(2, HIDDEN, generator=generator)
    for _ in range(steps):
        engine.model.begin_step()
        for index, layer in engine.layers.items():
            order = torch.randperm(EXPERTS, generator=torch.Generator().manual_seed(index))
            likelihood = ((1.0 + order) ** -1.5).expand(2, EXPERTS)
            layer.forward(
                rows, torch.multinomial(likelihood, TOP_K, generator=generator), torch.rand(2, TOP_K)
            )
        engine.model.context.copies.start(lambda: None).result()  # a pass takes long enough for a copy


def uses(engine: Engine) -> torch.Tensor:
    return torch.stack([layer.statistics.totals() for layer in engine.layers.values()])


def hits(report: dict) -> float:
    return report["hit_rate"] * sum(layer["uses"] for layer in report["layers"])


def test_updates_reach_the_best_static_placement_and_copy_what_enters_and_no_more():
    with Engine(masks("uniform"), HybridOptions(update_interval=10)) as engine:
        serve(engine, 100, seed=1)
        before, uses_before = engine.model.report(), uses(engine)
        serve(engine, 300, seed=2)
        after, later_uses = engine.model.report(), uses(engine) - uses_before
    best = later_uses.sort(descending=True).values[:, : SLOTS // len(MOE_LAYERS)].sum()
    assert hits(after) - hits(before) > 0.95 * int(best)
    assert after["experts_moved"] > 0
    copied = after["experts_moved"] * BYTES_OF_EXPERT
    assert after["bytes"] == {"update": copied, "prefill": 0, "misses": 0}


def test_frequency_placement_from_a_recorded_file_is_as_good_as_the_best(tmp_path):
    with Engine(masks("uniform"), HybridOptions()) as engine:
        engine.model.recorder = DistributionRecorder(
            engine.model.layers, engine.model.backend, DECODER_LAYERS
        )
        engine.model.recorder.start()
        serve(engine, 200, seed=3)
        path = engine.model.recorder.save(tmp_path)
        unaware = engine.model.report()["hit_rate"]
    counts = read_activation_counts(path, DECODER_LAYERS, EXPERTS)
    with Engine(masks("frequency", counts), HybridOptions()) as engine:
        serve(engine, 200, seed=4)
        report = engine.model.report()
        best = uses(engine).flatten().sort(descending=True).values[:SLOTS].sum()
        assert report["hit_rate"] > 0.95 * int(best) / int(uses(engine).sum())
    assert report["device_experts"] == SLOTS
    assert unaware < 0.8 * report["hit_rate"], "the load is skewed, and `uniform` knows nothing of it"
    assert report["bytes_copied"] == 0


def test_the_report_says_where_each_expert_is_and_how_often_it_was_used():
    generator = torch.Generator().manual_seed(5)
    with Engine(masks("random"), HybridOptions()) as engine:
        ids = {index: torch.randint(EXPERTS, (7, TOP_K), generator=generator) for index in engine.layers}
        for index, layer in engine.layers.items():
            layer.forward(torch.randn(7, HIDDEN, generator=generator), ids[index], torch.rand(7, TOP_K))
        rows = engine.model.report()["layers"]
    assert [row["layer"] for row in rows] == list(MOE_LAYERS)
    for row in rows:
        chosen = ids[row["layer"]].flatten()
        on_device = masks("random")[row["layer"]]
        assert row["expert_uses"] == chosen.bincount(minlength=EXPERTS).tolist()
        assert row["device_experts"] == on_device.nonzero().flatten().tolist()
        assert row["hit_rate"] == on_device[chosen].float().mean()
