"""What `kt top` shows of two readings: totals since the server's start, and what happened between the two."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from kt_kernel.cli.reading import Reading, Report

_BAR_CELLS = 10
_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def view(before: Reading, now: Reading, trouble: str = "") -> Group:
    """Everything. `before` is `now` for the first reading; `trouble` says why there is no newer one."""
    return Group(*_above(before, now, trouble), *_layers(before.report, now.report, now.report["layers"]))


def screen_view(
    before: Reading, now: Reading, trouble: str, first_layer: int, console: Console
) -> tuple[Group, int]:
    """As much as fits on the screen, with the layers from `first_layer` on if there are so many.

    Returns also the layer that is first now: the end of the list stays at the end of the screen.
    """
    above = _above(before, now, trouble)
    layers = now.report["layers"]
    used = len(console.render_lines(Group(*above), console.options.update(height=None))) + 2  # head, keys
    room = max(1, console.size.height - used)
    first = max(0, min(first_layer, len(layers) - room))
    shown = layers[first : first + room]
    table = _layers(before.report, now.report, shown)
    keys = "q quits"
    if table and len(shown) < len(layers):
        keys = (
            f"layers {first + 1} to {first + len(shown)} of {len(layers)}; arrows and space scroll, q quits"
        )
    return Group(*above, *table, Text(keys, style="dim", no_wrap=True)), first


def _above(before: Reading, now: Reading, trouble: str) -> list[RenderableType]:
    parts: list[RenderableType] = [_summary(before, now)]
    if trouble:
        parts.append(Text(trouble, style="red", no_wrap=True, overflow="ellipsis"))
    return parts


def _summary(before: Reading, now: Reading) -> Table:
    table = Table(title=escape(now.model), title_justify="left", box=None, show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, text in _figures(before, now):
        table.add_row(name, text)
    return table


def _figures(before: Reading, now: Reading) -> list[tuple[str, str]]:
    """Without slots on a device there are no hits, and nothing is moved or copied."""
    report, earlier = now.report, before.report
    seconds = now.time - before.time
    experts = ("experts", _experts(report))
    cpu = ("CPU", _cpu(earlier["cpu"], report["cpu"], seconds))
    tokens = [("tokens", _tokens(earlier, report, seconds))] if "tokens" in report else []
    if not has_slots(report):
        return [experts, *tokens, ("prefill", _prefill(report["prefill"])), cpu]
    hits = f"{percent(recent_hit_rate([earlier], [report]))} now, {percent(report['hit_rate'])} in all"
    return [
        experts,
        *tokens,
        ("hit rate", hits),
        ("moved", f"{report['experts_moved']} experts in {report['updates']} updates"),
        ("copied", _copied(earlier, report, seconds)),
        ("prefill", _prefill(report["prefill"])),
        cpu,
        ("misses", _misses(report)),
    ]


def has_slots(report: Report) -> bool:
    """Whether any layer has room for experts on a device."""
    return any(layer["capacity"] for layer in report["layers"])


def _experts(report: Report) -> str:
    share = report["device_experts"] / report["experts"] if report["experts"] else None
    return f"{report['device_experts']} of {report['experts']} on the device ({percent(share)})"


def _copied(earlier: Report, report: Report, seconds: float) -> str:
    purposes = ", ".join(f"{name} {size(count)}" for name, count in report["bytes"].items())
    rate = _rate(report["bytes_copied"] - earlier["bytes_copied"], seconds)
    return f"{size(report['bytes_copied'])} to the device ({purposes}), {rate}"


def _prefill(prefill: dict[str, Any]) -> str:
    if not prefill["threshold"]:
        return "layer by layer: off"
    text = f"layer by layer from {prefill['threshold']} tokens: {prefill['chunks']} chunks"
    if prefill["fallbacks"]:
        text += f", [yellow]{prefill['fallbacks']} without enough device memory[/]"
    return text


def _cpu(earlier: dict[str, Any], cpu: dict[str, Any], seconds: float) -> str:
    calls, busy, read = (cpu[key] - earlier[key] for key in ("calls", "seconds", "bytes"))
    share = busy / seconds if seconds > 0 else None
    speed = f"{cpu['gb_per_s']:.1f} GB/s" if cpu["gb_per_s"] is not None else "nothing"
    recent = f"{read / busy / 1e9:.1f} GB/s" if busy > 0 else "idle"
    return f"{recent} in {calls} calls, busy {percent(share)}; {speed} in all of {cpu['calls']} calls"


def _tokens(earlier: Report, report: Report, seconds: float) -> str:
    """Of a server; a model of transformers has no such counters."""
    now, before = report["tokens"], earlier["tokens"]
    rates = [
        "-" if seconds <= 0 else f"{(now[kind] - before[kind]) / seconds:.1f}"
        for kind in ("output", "prompt")
    ]
    prompts = now["prompt"] + now["cached"]
    found = percent(now["cached"] / prompts if prompts else None)
    return f"{rates[0]}/s written, {rates[1]}/s of prompts; {found} of prompts in the prefix cache"


def _misses(report: Report) -> str:
    deferred = report["deferred"]
    later = f"up to {deferred} of a token's experts one layer later" if deferred else "nothing deferred"
    return f"policy {report['miss_policy']}, {later}"


def _layers(earlier: Report, report: Report, shown: list[dict[str, Any]]) -> list[RenderableType]:
    """A table of these layers; without slots on a device there is nothing to say of each."""
    if not has_slots(report):
        return []
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("layer", "slots", "version", "hits now", "", "in all"):
        table.add_column(name, no_wrap=True, min_width=len(name) or _BAR_CELLS)
    table.add_column("experts on the device")  # the only one that gives way: its cells are cut below
    known = {layer["layer"]: layer for layer in earlier["layers"]}
    for layer in shown:
        rate = recent_hit_rate([known.get(layer["layer"], layer)], [layer])
        table.add_row(
            str(layer["layer"]),
            f"{len(layer['device_experts'])}/{layer['capacity']}",
            str(layer["version"]),
            percent(rate),
            bar(rate),
            percent(layer["hit_rate"]),
            Text(ranges(layer["device_experts"]), no_wrap=True, overflow="ellipsis"),
        )
    return [table]


def recent_hit_rate(earlier: Iterable[dict[str, Any]], now: Iterable[dict[str, Any]]) -> float | None:
    """Share of the experts used between two reports that were on the device; None if none was used."""
    hits = uses = 0.0
    for sign, reports in ((-1, earlier), (1, now)):
        for part in reports:
            for layer in part.get("layers", [part]):
                uses += sign * layer["uses"]
                hits += sign * layer["uses"] * (layer["hit_rate"] or 0.0)
    return hits / uses if uses > 0 else None


def percent(share: float | None) -> str:
    """0.25 -> '25.0 %'; '-' if there is none."""
    return "-" if share is None else f"{100 * share:.1f} %"


def bar(share: float | None) -> str:
    """A share as cells."""
    filled = round((share or 0.0) * _BAR_CELLS)
    return "█" * filled + "·" * (_BAR_CELLS - filled)


def ranges(numbers: Iterable[int]) -> str:
    """[0, 1, 2, 5] -> '0-2 5'."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return " ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def size(count: float) -> str:
    """1500000 -> '1.5 MB'."""
    for unit in _UNITS:
        if count < 1000 or unit == _UNITS[-1]:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("the last unit takes every size")


def _rate(count: float, seconds: float) -> str:
    return f"{size(count / seconds)}/s now" if seconds > 0 else "- now"
