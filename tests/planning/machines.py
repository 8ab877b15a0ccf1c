"""Machines that nobody here has, and the models of the registry to plan for."""

from __future__ import annotations

from kt_kernel.machine_limits import Limits
from kt_kernel.planning.machine_facts import Gpu, MachineFacts, Node

GB = 10**9


def machine(
    cpu: str,
    variant: str,
    *,
    threads: int,
    memory: float,
    read: float,
    bf16: float,
    nodes: int = 1,
    gpus: tuple[Gpu, ...] = (),
    used: float = 0.04,
) -> MachineFacts:
    """`memory`, `read` in GB and GB/s, `bf16` in TFLOP/s; `used`: the share of memory that others have."""
    free = int(memory * GB * (1 - used))
    return MachineFacts(
        cpu=cpu,
        variant=variant,
        threads=threads,
        nodes=tuple(
            Node(number, threads // nodes, int(memory * GB / nodes), free // nodes) for number in range(nodes)
        ),
        memory_bytes=int(memory * GB),
        available_bytes=free,
        limits=Limits(read * 1e9, bf16 * 1e12, 2 * bf16 * 1e12),
        gpus=gpus,
    )


def gpu(index: int, name: str, gigabytes: float, generation: int, capability: tuple[int, int]) -> Gpu:
    return Gpu(index, name, int(gigabytes * GB), int(gigabytes * GB * 0.97), generation, 16, capability)


XEON = machine(
    "Intel(R) Xeon(R) Platinum 8488C",
    "amx",
    threads=96,
    memory=1024,
    read=480,
    bf16=60,
    nodes=2,
    gpus=tuple(gpu(index, "NVIDIA GeForce RTX 4090", 25.3, 4, (8, 9)) for index in range(2)),
)
EPYC = machine(
    "AMD EPYC 9355 32-Core Processor",
    "avx512_bf16",
    threads=32,
    memory=768,
    read=450,
    bf16=8,
    gpus=(gpu(0, "NVIDIA GeForce RTX 5090", 33.7, 5, (12, 0)),),
)
DESKTOP = machine(
    "13th Gen Intel(R) Core(TM) i7-13700K",
    "avx_vnni",
    threads=16,
    memory=67,
    read=70,
    bf16=1.2,
    gpus=(gpu(0, "NVIDIA GeForce RTX 3060", 12.6, 4, (8, 6)),),
)
NO_GPU = machine(
    "AMD Ryzen 9 7950X 16-Core Processor", "avx512_bf16", threads=16, memory=134, read=60, bf16=4
)
GROUP = machine("AMD EPYC 7763 64-Core Processor", "avx2", threads=4, memory=34, read=40, bf16=0.25)

MACHINES = {"xeon": XEON, "epyc": EPYC, "desktop": DESKTOP, "no-gpu": NO_GPU, "group": GROUP}
