"""Which bytes of a plan lie where, and the refusal of what main memory cannot hold."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from kt_kernel.kv_budget import LEAST_TOKENS, most_cached_tokens
from kt_kernel.planning import dense_storage
from kt_kernel.planning.errors import DoesNotFitError, gigabytes
from kt_kernel.planning.gpu_plan import GpuPlan
from kt_kernel.planning.machine_facts import MachineFacts, Node
from kt_kernel.planning.model_facts import GGUF, ModelFacts
from kt_kernel.planning.requests import kept_states, kv_bytes
from kt_kernel.planning.spread import Spread
from kt_kernel.planning.user_options import UserOptions

RAM, DISK = "RAM", "disk"
# Of SGLang's processes with torch: the demo's server had 3.4 GB of private memory after some requests, 1.5 of
# them KV cache and 0.5 weights (AMD Zen 4, 2026-11-30). Each further rank is counted as much again.
PROCESS_BYTES = 1.5e9
# Buffers between CPU and GPU, page-locked, at the chunk sizes that a plan chooses.
_EXCHANGE_BYTES = 0.5e9
# What `kt quant --method int4` makes of a weight: 4 bits and the scales of groups of 128 columns.
_INT4_BITS = 4.25
_TOKENS_STEP = 1024
# For all that grows beside a plan: other programs, the server's own requests and buffers.
_KEPT_FREE = 0.02
# Bits per weight of the smallest GGUF types that we read.
_FEWEST_BITS = 2.6


@dataclass(frozen=True)
class Row:
    """`bytes` at `place`: "RAM", "RAM node 0", "GPU 0" or "disk"."""

    what: str
    place: str
    bytes: float


@dataclass(frozen=True)
class Memory:
    """The rows, and how many tokens the KV cache holds. `shortened`: fewer than the server would choose."""

    rows: tuple[Row, ...]
    kv_tokens: int
    shortened: bool = False


def capacities(machine: MachineFacts, gpu: GpuPlan | None) -> dict[str, int]:
    """Place -> bytes available there before anything is loaded."""
    places = {RAM: machine.available_bytes}
    if len(machine.nodes) > 1:
        places |= {node_place(node): node.available_bytes for node in machine.nodes}
    if gpu is not None:
        places |= {f"GPU {g.index}": g.free_bytes for g in machine.gpus[: gpu.ranks]}
    return places


def usable(machine: MachineFacts) -> int:
    """Of main memory: not the last bit of it."""
    return int((1 - _KEPT_FREE) * machine.available_bytes)


def node_place(node: Node) -> str:
    return f"{RAM} node {node.number}"


def main_memory(rows: Iterable[Row]) -> float:
    """All that is in main memory, on whatever node."""
    return sum(row.bytes for row in rows if row.place.startswith(RAM))


def memory_rows(
    facts: ModelFacts,
    machine: MachineFacts,
    options: UserOptions,
    dtype: str | None,
    gpu: GpuPlan | None,
) -> Memory:
    """What takes memory where; `check_memory` says whether there is as much."""
    spread = Spread.of(options)
    rows = list(_expert_rows(facts, machine, options))
    if not options.has("--kt-gguf-mmap"):
        rows.append(Row("while loading: a layer", RAM, facts.bytes_per_layer))
    if gpu is not None:
        rows.append(Row("processes", RAM, PROCESS_BYTES * gpu.ranks))
        rows.append(Row("exchange with the GPU", RAM, _EXCHANGE_BYTES))
        rows += _gpu_rows(machine, gpu)
        return Memory(tuple(row for row in rows if row.bytes), gpu.kv_tokens)
    dense = dense_storage.on_cpu(facts, options, dtype)
    rows.append(Row(f"other weights ({dense.format})", RAM, dense.total / spread.hosts))
    width = _width(options, dtype)
    rows.append(Row("processes", RAM, PROCESS_BYTES * spread.processes))
    ranks = spread.ranks
    states = kept_states(facts, options, ranks, width, machine.available_bytes)
    rows.append(Row(f"states of requests, {states.number}", RAM, ranks * states.bytes / spread.hosts))
    of_a_rank = kv_bytes(facts.sizes, ranks, width)
    per_token = ranks * of_a_rank / spread.hosts
    wanted = tokens = _kv_tokens(facts, machine, options, of_a_rank)
    if not options.has("--max-total-tokens"):
        left = usable(machine) - main_memory(rows)
        fewer = int(left // max(1, per_token)) // _TOKENS_STEP * _TOKENS_STEP
        tokens = min(wanted, max(LEAST_TOKENS, fewer))
    rows.append(Row(f"KV cache, {tokens} tokens", RAM, per_token * tokens))
    return Memory(tuple(row for row in rows if row.bytes), tokens, tokens < wanted)


def used_nodes(machine: MachineFacts, options: UserOptions) -> list[Node]:
    """Those that hold experts: as named by the user, or as many of those with cores as there are pools."""
    with_cores = [node for node in machine.nodes if node.cores] or list(machine.nodes)
    named = {int(word) for word in options.values("--kt-numa-nodes") if word.isdigit()}
    if named:
        return [node for node in with_cores if node.number in named] or with_cores
    pools = options.integer("--kt-threadpool-count")
    return with_cores[:pools] if pools and pools > 0 else with_cores


def _expert_rows(facts: ModelFacts, machine: MachineFacts, options: UserOptions) -> Iterable[Row]:
    if options.has("--kt-gguf-mmap"):
        yield Row(f"experts ({facts.method}), mapped", DISK, facts.expert_bytes)
        return
    nodes = used_nodes(machine, options)
    for node in nodes:
        place = RAM if len(machine.nodes) == 1 else node_place(node)
        here = facts.expert_bytes / Spread.of(options).hosts
        yield Row(f"experts ({facts.method})", place, here / len(nodes))


def _gpu_rows(machine: MachineFacts, gpu: GpuPlan) -> Iterable[Row]:
    for device in machine.gpus[: gpu.ranks]:
        place = f"GPU {device.index}"
        yield Row("other weights", place, gpu.dense)
        yield Row(f"states of requests, {gpu.states.number}", place, gpu.states.bytes)
        yield Row(f"KV cache, {gpu.kv_tokens} tokens", place, gpu.kv_bytes)
        yield Row(f"workspace, chunks of {gpu.chunk}", place, gpu.workspace)
        yield Row("slots of streamed layers", place, gpu.streamed)
        yield Row(f"experts, {gpu.experts} of each layer", place, gpu.expert_bytes)


def _width(options: UserOptions, dtype: str | None) -> int:
    """Bytes of a number in the model's dtype."""
    return 4 if (options.text("--dtype") or dtype) in ("float32", "float") else 2


def _kv_tokens(facts: ModelFacts, machine: MachineFacts, options: UserOptions, per_token: int) -> int:
    """As asked for, or as many as the server would choose."""
    if (asked := options.integer("--max-total-tokens")) is not None:
        return asked
    context = options.integer("--context-length") or facts.sizes.context
    return most_cached_tokens(per_token, context, machine.available_bytes)


def check_memory(facts: ModelFacts, machine: MachineFacts, options: UserOptions, rows: Iterable[Row]) -> None:
    """Raises DoesNotFitError if main memory, or a NUMA node's, cannot hold the rows."""
    rows = list(rows)
    needed = main_memory(rows)
    if needed > (most := usable(machine)):
        raise DoesNotFitError("main memory", needed, most, _ways(facts, options, rows, most))
    for node in machine.nodes if len(machine.nodes) > 1 else ():
        on_node = sum(row.bytes for row in rows if row.place == node_place(node))
        if on_node > node.available_bytes:
            raise DoesNotFitError(
                f"NUMA node {node.number}",
                on_node,
                node.available_bytes,
                ["--kt-numa-nodes with the nodes that have the memory", "freeing memory of that node"],
            )


def _ways(facts: ModelFacts, options: UserOptions, rows: list[Row], available: float) -> list[str]:
    """Changes after which it fits, the mildest first."""
    needed = main_memory(rows)
    without_experts = needed - facts.expert_bytes - facts.bytes_per_layer
    ways = []
    kv = sum(row.bytes for row in rows if row.what.startswith("KV cache") and row.place == RAM)
    if options.has("--max-total-tokens") and 0 < needed - available < kv:
        tokens = int(options.integer("--max-total-tokens") or 0)
        fewer = int(tokens * (kv - needed + available) / kv)
        if fewer >= LEAST_TOKENS:
            ways.append(f"--max-total-tokens {fewer // _TOKENS_STEP * _TOKENS_STEP} (a shorter context)")
    if facts.container == GGUF and without_experts <= available:
        ways.append(f"--kt-gguf-mmap: the experts stay on disk ({gigabytes(without_experts)} of RAM; slower)")
    weights = facts.sizes.moe_layers * facts.sizes.experts * facts.sizes.expert_parameters
    int4 = weights * _INT4_BITS / 8
    if facts.container != GGUF and int4 < 0.8 * facts.expert_bytes and without_experts + int4 <= available:
        ways.append(
            f"the experts in 4 bits, by kt quant --method int4 and --kt-weight-path "
            f"({gigabytes(without_experts + int4)} in all)"
        )
    layers = facts.sizes.moe_layers  # and one more while loading
    bits = 8 * (available - without_experts) / weights * layers / (layers + 1)
    if bits >= _FEWEST_BITS and bits * weights < 8 * facts.expert_bytes:
        ways.append(f"a GGUF file with at most {math.floor(10 * bits) / 10} bits per weight")
    return ways
