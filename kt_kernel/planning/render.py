"""A plan for people, in 80 columns of plain text, and for programs."""

from __future__ import annotations

import textwrap
from typing import Any

from kt_kernel.planning.estimate import PROMPT
from kt_kernel.planning.machine_facts import MachineFacts
from kt_kernel.planning.model_facts import REGISTRY, ModelFacts
from kt_kernel.planning.plan import Plan

WIDTH = 80
_LABEL = 10


def plan_text(plan: Plan) -> str:
    """Lines of at most `WIDTH` characters."""
    lines = [
        *_labelled("model", _model(plan.name, plan.facts)),
        *_labelled("machine", _machine(plan.machine)),
        *_labelled("attention", f"{plan.facts.sizes.attention}, {plan.attention}"),
        "",
        *_table(plan),
        "",
        *_labelled("decode", f"about {_speed(plan.decode.tokens_per_second)} tokens/s; {plan.decode.bound}"),
        *_labelled(
            "prefill",
            f"about {_speed(plan.prefill.tokens_per_second)} tokens/s for {PROMPT} tokens; "
            f"{plan.prefill.bound}",
        ),
    ]
    for flag, values in plan.flags.items():
        lines += _labelled("chosen", " ".join([flag, *values]))
    for note in plan.notes:
        lines += _labelled("note", note)
    return "\n".join(lines)


def plan_json(plan: Plan, command: list[str]) -> dict[str, Any]:
    """All numbers of a plan, bytes and tokens per second, and the server's command."""
    machine = plan.machine
    return {
        "model": plan.name,
        "facts": plan.facts.to_json(),
        "machine": {
            "cpu": machine.cpu,
            "variant": machine.variant,
            "threads": machine.threads,
            "numa_nodes": [vars(node) for node in machine.nodes],
            "memory_bytes": machine.memory_bytes,
            "available_bytes": machine.available_bytes,
            "limits": vars(machine.limits),
            "gpus": [vars(gpu) for gpu in machine.gpus],
        },
        "placement": [vars(row) for row in plan.rows],
        "capacities": plan.capacities,
        "kv_tokens": plan.kv_tokens,
        "attention": plan.attention,
        "flags": plan.flags,
        "prefill": {"tokens": PROMPT, **vars(plan.prefill)},
        "decode": vars(plan.decode),
        "notes": list(plan.notes),
        "command": command,
    }


def _model(name: str, facts: ModelFacts) -> str:
    sizes = facts.sizes
    said = (
        f"{name}: {sizes.family}, {sizes.layers} layers, {sizes.experts} experts, top-{sizes.top_k}, "
        f"hidden {sizes.hidden}, method {facts.method}, {_bytes(facts.total_bytes)}"
    )
    return said + (" (from the registry, no file was read)" if facts.container == REGISTRY else "")


def _machine(machine: MachineFacts) -> str:
    nodes = f"{len(machine.nodes)} NUMA node" + ("s" if len(machine.nodes) > 1 else "")
    said = (
        f"{machine.cpu}, {machine.threads} threads, {nodes}, {machine.variant}, "
        f"{_bytes(machine.available_bytes)} of {_bytes(machine.memory_bytes)} available, "
        f"reads {machine.limits.read / 1e9:.0f} GB/s"
    )
    for gpu in machine.gpus:
        link = f", PCIe {gpu.pcie_generation} x{gpu.pcie_width}" if gpu.pcie_generation else ""
        said += f"; {gpu.name}, {_bytes(gpu.free_bytes)} free{link}"
    return said


def _table(plan: Plan) -> list[str]:
    lines = [f"{'where':<12} {'what':<36} {'size':>10}   available"]
    for place in dict.fromkeys(row.place for row in plan.rows):
        rows = [row for row in plan.rows if row.place == place]
        for row in rows:
            lines.append(f"{place:<12} {row.what[:36]:<36} {_bytes(row.bytes):>10}")
        if place in plan.capacities:
            total = sum(row.bytes for row in rows)
            lines.append(
                f"{'':<12} {'sum':<36} {_bytes(total):>10}   {_bytes(plan.capacities[place])}".rstrip()
            )
    return lines


def _labelled(label: str, text: str) -> list[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=f"{label:<{_LABEL}} ",
        subsequent_indent=" " * (_LABEL + 1),
        break_long_words=False,
        break_on_hyphens=False,
    )


def _bytes(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def _speed(tokens_per_second: float) -> str:
    return f"{tokens_per_second:.1f}" if tokens_per_second < 10 else f"{tokens_per_second:.0f}"
