"""A table of at most 80 columns whose lines come as they are measured, JSON lines, and a chart."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from kt_kernel.bench.serving.figures import Figures, Spread
from kt_kernel.errors import ConfigurationError, FeatureUnavailableError

_WIDTHS = (5, 7, 7, 15, 15, 15, 9)
_TOP = ("", "tokens", "tokens", "TTFT ms", "TPOT ms", "ITL ms", "output")
_HEAD = ("users", "prompt", "output", "median   p95", "median   p95", "median   p95", "tokens/s")

_KINDS_OF_CHARTS = (".png", ".svg", ".pdf")
_CHARTS = (
    ("TTFT, median (ms)", lambda figures: figures.ttft_ms and figures.ttft_ms.median),
    ("TPOT, median (ms)", lambda figures: figures.tpot_ms and figures.tpot_ms.median),
    ("output (tokens/s)", lambda figures: figures.output_tokens_per_s),
)


def head_lines() -> list[str]:
    """The head of the table."""
    return [_line(_TOP), _line(_HEAD)]


def table_line(figures: Figures) -> str:
    """One level; the tokens are those that the server counted."""
    return _line(
        (
            str(figures.level.users),
            _number(figures.prompt_tokens),
            _number(figures.output_tokens),
            _spread(figures.ttft_ms),
            _spread(figures.tpot_ms),
            _spread(figures.itl_ms),
            _number(figures.output_tokens_per_s, 1),
        )
    )


def json_line(figures: Figures, model: str) -> str:
    """All figures of one level."""
    return json.dumps({"model": model, **asdict(figures)})


def check_chart(file: Path) -> None:
    """What would keep `draw` from writing this file, before anything is measured.

    Raises:
        ConfigurationError: its name or folder does not allow it.
        FeatureUnavailableError: matplotlib is not installed.
    """
    if file.suffix.lower() not in _KINDS_OF_CHARTS:
        raise ConfigurationError(
            f"--png is {str(file)!r}, expected a name that ends in {', '.join(_KINDS_OF_CHARTS)}"
        )
    place = file if file.is_file() else file.parent
    if file.is_dir() or not (file.parent.is_dir() and os.access(place, os.W_OK)):
        raise ConfigurationError(f"{file} cannot be written: name a file in a folder of yours with --png")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise FeatureUnavailableError(
            "A chart needs matplotlib, which is not installed: pip install matplotlib, or leave out --png"
        ) from None


def draw(file: Path, title: str, all_figures: Sequence[Figures]) -> None:
    """Three charts over the number of users, a line for each pair of prompt and output lengths."""
    from matplotlib.figure import Figure

    picture = Figure(figsize=(12, 4), layout="constrained")
    picture.suptitle(title)
    kinds = dict.fromkeys((f.level.prompt_tokens, f.level.output_tokens) for f in all_figures)
    for axes, (name, value) in zip(picture.subplots(1, len(_CHARTS)), _CHARTS, strict=True):
        for kind in kinds:
            own = [f for f in all_figures if (f.level.prompt_tokens, f.level.output_tokens) == kind]
            points = [(f.level.users, value(f)) for f in own if value(f) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", label=f"{kind[0]} + {kind[1]} tokens")
        axes.set(xlabel="users", ylabel=name, ylim=(0, None))
        axes.legend()
    picture.savefig(file, dpi=120)


def _line(cells: Sequence[str]) -> str:
    return " ".join(f"{cell:>{width}}" for cell, width in zip(cells, _WIDTHS, strict=True)).rstrip()


def _number(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _spread(spread: Spread | None) -> str:
    return "-" if spread is None else f"{_short(spread.median)} {_short(spread.p95):>7}"


def _short(milliseconds: float) -> str:
    return f"{milliseconds:.1f}" if milliseconds < 1000 else f"{milliseconds:.0f}"
