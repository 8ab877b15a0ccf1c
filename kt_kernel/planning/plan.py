"""The plan: where each byte of a model goes on a machine, the server's flags, and what speed to expect.

A pure function of facts, machine and the user's options: nothing is read, measured or started here, so tests
plan for machines that nobody has.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto

from kt_kernel.planning.attention_backend import attention_backend
from kt_kernel.planning.errors import DoesNotFitError
from kt_kernel.planning.estimate import Speed, expected_speeds
from kt_kernel.planning.expert_backend import expert_backend
from kt_kernel.planning.gpu_plan import GpuPlan, plan_gpus
from kt_kernel.planning.machine_facts import MachineFacts
from kt_kernel.planning.memory import Memory, Row, capacities, check_memory, memory_rows
from kt_kernel.planning.model_facts import ModelFacts
from kt_kernel.planning.user_options import UserOptions

_BACKEND = "--moe-runner-backend"


@dataclass(frozen=True)
class Preferences:
    """What the registry, or the demo, says of a model beside its sizes. None, (): nothing."""

    dtype: str | None = None
    tool_call_parser: str | None = None
    reasoning_parser: str | None = None
    flags: tuple[str, ...] = ()
    statistics: str | None = None
    """A file of counts for `--init-expert-location`."""
    notes: tuple[str, ...] = ()


class Fit(Enum):
    """What to do with a model that main memory cannot hold."""

    REFUSE = auto()
    PLAN_ALL_THE_SAME = auto()


@dataclass(frozen=True)
class Plan:
    """`flags`: option -> values, only what the user left open. `rows`: what takes memory where;
    `capacities`: place -> bytes that were available there.
    """

    name: str
    facts: ModelFacts
    machine: MachineFacts
    flags: dict[str, list[str]]
    rows: tuple[Row, ...]
    capacities: dict[str, int]
    kv_tokens: int
    attention: str
    gpu: GpuPlan | None
    prefill: Speed
    decode: Speed
    notes: tuple[str, ...] = field(default=())


def make_plan(
    name: str,
    facts: ModelFacts,
    machine: MachineFacts,
    options: UserOptions,
    preferences: Preferences = Preferences(),
    fit: Fit = Fit.REFUSE,
) -> Plan:
    """Raises DoesNotFitError, before anything is loaded, for what cannot fit; what GPUs cannot hold is never
    planned.
    """
    gpu = plan_gpus(facts, machine, options) if uses_gpu(machine, options) else None
    memory = memory_rows(facts, machine, options, preferences.dtype, gpu)
    complaint = _check(facts, machine, options, memory, fit)
    prefill, decode = expected_speeds(facts, machine, options, preferences.dtype, gpu)
    return Plan(
        name=name,
        facts=facts,
        machine=machine,
        flags=_flags(memory, options, preferences, gpu) | _kernels(facts, machine, options, gpu),
        rows=memory.rows,
        capacities=capacities(machine, gpu),
        kv_tokens=memory.kv_tokens,
        attention=attention_backend(facts.sizes, options, machine.gpus[0] if gpu else None),
        gpu=gpu,
        prefill=prefill,
        decode=decode,
        notes=(*complaint, *preferences.notes, *_notes(facts, machine, options, gpu)),
    )


def uses_gpu(machine: MachineFacts, options: UserOptions) -> bool:
    """Unless there is none, or the user wants the CPU."""
    return bool(machine.gpus) and options.text("--device") in (None, "cuda")


def _check(
    facts: ModelFacts, machine: MachineFacts, options: UserOptions, memory: Memory, fit: Fit
) -> tuple[str, ...]:
    """Notes; raises DoesNotFitError unless it was told not to."""
    try:
        check_memory(facts, machine, options, memory.rows)
    except DoesNotFitError as error:
        if fit is Fit.REFUSE:
            raise
        return (str(error),)
    return ()


def _flags(
    memory: Memory,
    options: UserOptions,
    preferences: Preferences,
    gpu: GpuPlan | None,
) -> dict[str, list[str]]:
    chosen: dict[str, list[str]] = {}
    if preferences.dtype is not None:
        chosen["--dtype"] = [preferences.dtype]
    if preferences.tool_call_parser:
        chosen["--tool-call-parser"] = [preferences.tool_call_parser]
    if preferences.reasoning_parser:
        chosen["--reasoning-parser"] = [preferences.reasoning_parser]
    if memory.shortened:
        chosen["--max-total-tokens"] = [str(memory.kv_tokens)]
    if gpu is not None:
        chosen |= _gpu_flags(gpu, preferences)
    for words in preferences.flags:
        flag, *values = words.split()
        chosen.setdefault(flag, values)
    return {flag: values for flag, values in chosen.items() if not options.has(flag)}


def _kernels(
    facts: ModelFacts, machine: MachineFacts, options: UserOptions, gpu: GpuPlan | None
) -> dict[str, list[str]]:
    backend = None if gpu is None else expert_backend(facts, machine.gpus[0])
    return {_BACKEND: [backend]} if backend and not options.has(_BACKEND) else {}


def _gpu_flags(gpu: GpuPlan, preferences: Preferences) -> dict[str, list[str]]:
    chosen = {
        "--kt-num-gpu-experts": [str(gpu.experts)],
        "--max-total-tokens": [str(gpu.kv_tokens)],
        "--chunked-prefill-size": [str(gpu.chunk)],
        "--mem-fraction-static": [str(gpu.static_share)],
    }
    if gpu.ranks > 1:
        chosen["--tp-size"] = [str(gpu.ranks)]
    if gpu.states.number:
        chosen["--max-mamba-cache-size"] = [str(gpu.states.number)]
    if gpu.threshold:
        chosen["--kt-gpu-prefill-token-threshold"] = [str(gpu.threshold)]
    if preferences.statistics and 0 < gpu.experts < gpu.prefill.experts:
        chosen["--kt-expert-placement-strategy"] = ["frequency"]
        chosen["--init-expert-location"] = [preferences.statistics]
    return chosen


def _notes(facts: ModelFacts, machine: MachineFacts, options: UserOptions, gpu: GpuPlan | None) -> list[str]:
    notes = []
    if gpu is not None:
        notes.append("GPU figures are arithmetic: no part of kt-kernel has run on a GPU yet.")
        unknown = [g.name for g in machine.gpus[: gpu.ranks] if g.known is None]
        if unknown:
            notes.append(f"{unknown[0]} is not in the table of GPUs: a slow one was assumed.")
        if options.has("--pp-size") or options.has("--dp-size"):
            notes.append("The memory is planned as if each GPU held the whole model.")
        if facts.has_biases:
            notes.append(
                "Its experts have biases and are not copied to a GPU: each stays where it is loaded."
            )
        if gpu.experts == facts.sizes.experts:
            notes.append("All experts fit on the GPU: SGLang without CPU experts would be faster.")
    if machine.limits.assumed:
        notes.append("The CPU's limits are assumed, not measured.")
    if options.has("--kt-gguf-mmap"):
        notes.append("Speeds are those with the whole file in memory; what must be read from disk is slower.")
    return notes
