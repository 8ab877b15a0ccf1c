"""The loss of a run as numbers and as a picture."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

logger = logging.getLogger(__name__)

_SMOOTHING = 0.9  # of the line through the single steps


def write_losses(losses: Sequence[float], folder: Path) -> None:
    """loss.csv, and loss.png where matplotlib is installed."""
    rows = [f"{number},{loss:.6g}\n" for number, loss in enumerate(losses, 1)]
    (folder / "loss.csv").write_text("step,loss\n" + "".join(rows))
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning("matplotlib is not installed: no loss.png, only loss.csv")
        return
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    numbers = range(1, len(losses) + 1)
    axes.plot(numbers, losses, color="0.75", linewidth=1, label="step")
    axes.plot(numbers, smoothed(losses), color="tab:blue", linewidth=1.6, label="smoothed")
    axes.set(xlabel="step", ylabel="loss")
    axes.grid(visible=True, color="0.93")
    axes.legend(frameon=False)
    figure.savefig(folder / "loss.png", dpi=150)


def smoothed(losses: Sequence[float]) -> list[float]:
    """An exponential mean, without its usual pull towards the first value."""
    out, mean, weight = [], 0.0, 0.0
    for loss in losses:
        mean = _SMOOTHING * mean + (1 - _SMOOTHING) * loss
        weight = _SMOOTHING * weight + (1 - _SMOOTHING)
        out.append(mean / weight)
    return out
