"""Risk: scales are read for groups of another size than they were made for."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from kt_kernel.checkpoint import group_size
from kt_kernel.checkpoint.quantization_config import PER_ROW
from kt_kernel.errors import CheckpointError

FOUND = SimpleNamespace(format=SimpleNamespace(method="GPTQ_INT4", group_axis=0))
CHECKPOINT = SimpleNamespace(path="model")


def size_of(monkeypatch, gate, down, hidden: int, intermediate: int, promised: int | None = None) -> int:
    monkeypatch.setattr(group_size, "check_quantization_config", lambda *_: promised)
    monkeypatch.setattr(group_size, "_scale_shapes", lambda *_: (gate, down))
    return group_size.find_group_size(CHECKPOINT, FOUND, hidden, intermediate)


def test_the_down_projection_tells_where_gate_has_one_group(monkeypatch):
    assert size_of(monkeypatch, (1, 96), (3, 32), hidden=32, intermediate=96) == 32


def test_one_group_everywhere_is_one_scale_per_row(monkeypatch):
    assert size_of(monkeypatch, (1, 64), (1, 64), hidden=64, intermediate=64) == PER_ROW


@pytest.mark.parametrize(
    ("hidden", "intermediate", "name"), [(48, 64, "hidden_size"), (64, 48, "moe_intermediate_size")]
)
@pytest.mark.parametrize("promised", [32, None])
def test_groups_divide_both_sizes(monkeypatch, hidden, intermediate, name, promised):
    """Two groups of each: of 32 columns by the other size."""
    gate, down = (2, intermediate), (2, hidden)
    if promised is None and name == "hidden_size":
        gate = (1, intermediate)  # else the shapes say 24
    with pytest.raises(CheckpointError, match=f"groups of 32 columns, .* but {name} is 48"):
        size_of(monkeypatch, gate, down, hidden, intermediate, promised)
