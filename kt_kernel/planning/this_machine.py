"""The present machine as `MachineFacts`: what this process may use of it, not what is built in."""

from __future__ import annotations

import csv
import itertools
import logging
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from kt_kernel.hybrid.speeds import cpu_name
from kt_kernel.machine_limits import (
    MEASUREMENTS,
    Limits,
    best_of,
    keep_limits,
    known_limits,
    limits_key,
)
from kt_kernel.planning.machine_facts import Gpu, MachineFacts, Node
from kt_kernel.threads import plan_threads
from kt_kernel.usable_memory import usable_memory

logger = logging.getLogger(__name__)

_NODES = Path("/sys/devices/system/node")
_GPU_FIELDS = "index,name,memory.total,memory.free,pcie.link.gen.max,pcie.link.width.max,compute_cap"
_GPU_SECONDS = 10  # nvidia-smi takes seconds where no persistence daemon runs
_MIB = 1 << 20
CPU_ONLY = "KT_SGLANG_CPU_SHIMS"  # set to 1 where SGLang was installed to do without a GPU


def machine_facts(native: Any, environment: dict[str, str]) -> tuple[MachineFacts, int]:
    """The facts, and how often the limits have been measured: give both to `keep_machine` to keep them.

    `native`: the extension. `environment`: of the server that is planned; it says which GPUs count.
    """
    topology = native.topology()
    threads = plan_threads(topology)
    variant = native.cpu_features()["variant"]
    limits, measurements = _limits(native, variant, threads.threads, len(topology["numa_nodes"]))
    total, available = usable_memory()
    nodes = tuple(
        Node(n["node"], len(n["cores"]), n["memory_bytes"], _available_on(n["node"], available))
        for n in topology["numa_nodes"]
    )
    gpus = () if environment.get(CPU_ONLY) == "1" else tuple(visible_gpus(environment))
    return MachineFacts(
        cpu=cpu_name(),
        variant=variant,
        threads=threads.threads,
        nodes=nodes,
        memory_bytes=total,
        available_bytes=available,
        limits=limits,
        gpus=gpus,
    ), measurements


def keep_machine(facts: MachineFacts, measurements: int) -> None:
    """Keep what was measured for the next plan."""
    known, before = known_limits(_key(facts.variant, facts.threads, len(facts.nodes)))
    if measurements > before or known != facts.limits:
        keep_limits(_key(facts.variant, facts.threads, len(facts.nodes)), facts.limits, measurements)


# ---- limits --------------------------------------------------------------------------------------


def _key(variant: str, threads: int, nodes: int) -> dict[str, str | int]:
    return limits_key(cpu_name(), variant, threads, nodes)


def _limits(native: Any, variant: str, threads: int, nodes: int) -> tuple[Limits, int]:
    known, measurements = known_limits(_key(variant, threads, nodes))
    if known is not None and measurements >= MEASUREMENTS:
        return known, measurements
    logger.info("measuring how fast this machine reads memory (the first %d runs do)", MEASUREMENTS)
    return best_of(known, measure(native, threads)), measurements + 1


def measure(native: Any, threads: int) -> Limits:
    """Half a second on all threads."""
    from kt_kernel.bench.limits import measure_limits

    measured = measure_limits(native.Engine(threads))
    rates = {name: limit["per_second"] for name, limit in measured.items()}
    return Limits(rates["read"], max(rates["bf16_dot"], rates["f32_fma"]), rates["int8_dot"])


# ---- memory --------------------------------------------------------------------------------------


def _available_on(node: int, available: int) -> int:
    """Free memory and files in memory of one node, at most what the machine has available."""
    try:
        content = (_NODES / f"node{node}" / "meminfo").read_text()
    except OSError:
        return available
    kib = {
        name: int(value) for name, value in re.findall(r"Node \d+ (\w+(?:\(file\))?):\s+(\d+) kB", content)
    }
    free = kib.get("MemFree", 0) + kib.get("Active(file)", 0) + kib.get("Inactive(file)", 0)
    return min(available, free * 1024)


# ---- GPUs ----------------------------------------------------------------------------------------


def visible_gpus(environment: dict[str, str]) -> list[Gpu]:
    """By nvidia-smi, without loading torch; those that CUDA_VISIBLE_DEVICES leaves, if it names numbers."""
    program = shutil.which("nvidia-smi", path=environment.get("PATH", os.defpath))
    if program is None:
        return []
    command = [program, f"--query-gpu={_GPU_FIELDS}", "--format=csv,noheader,nounits"]
    try:
        output = subprocess.run(
            command, capture_output=True, text=True, timeout=_GPU_SECONDS, check=True, env=environment
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning("nvidia-smi does not answer (%s): planning without a GPU", error)
        return []
    gpus = [gpu for row in csv.reader(output.splitlines()) if (gpu := read_gpu(row))]
    chosen = environment.get("CUDA_VISIBLE_DEVICES")
    if chosen is None or not re.fullmatch(r"[-\d,\s]*", chosen):
        return gpus
    numbers = [int(number) for number in re.findall(r"-?\d+", chosen)]
    # CUDA ignores what stands behind the first number that no GPU has: -1 hides all.
    present = {gpu.index: gpu for gpu in gpus}
    return [present[number] for number in itertools.takewhile(present.__contains__, numbers)]


def read_gpu(row: list[str]) -> Gpu | None:
    """One line of nvidia-smi's answer; None for one that says no memory. Unknown fields are "[N/A]"."""
    fields = [field.strip() for field in row]
    try:
        index, name, total, free = int(fields[0]), fields[1], int(fields[2]) * _MIB, int(fields[3]) * _MIB
    except (ValueError, IndexError):
        return None
    generation, width = (int(f) if f.isdigit() else None for f in (*fields[4:6], "", "")[:2])
    parts = re.fullmatch(r"(\d+)\.(\d+)", fields[6]) if len(fields) > 6 else None
    capability = (int(parts[1]), int(parts[2])) if parts else None
    return Gpu(index, name, total, free, generation, width, capability)
