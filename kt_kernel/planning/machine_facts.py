"""What a plan must know of a machine. Tests make machines by hand; `this_machine.py` reads this one."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from kt_kernel.machine_limits import Limits


@dataclass(frozen=True)
class Node:
    """A NUMA node: cores that this process may use, and bytes of memory that it could get there."""

    number: int
    cores: int
    memory_bytes: int
    available_bytes: int


@dataclass(frozen=True)
class Gpu:
    """`pcie_generation`, `pcie_width`: of its link at best, None where unknown; `capability`: (8, 9)."""

    index: int
    name: str
    memory_bytes: int
    free_bytes: int
    pcie_generation: int | None = None
    pcie_width: int | None = None
    capability: tuple[int, int] | None = None

    @property
    def bus_bytes_per_second(self) -> float:
        """What copies get of the link: about 80 % of a PCIe lane's rate; of an unknown link, what the server
        assumes, too (PrefillMachine).
        """
        if not (self.pcie_generation and self.pcie_width):
            return 25e9
        return 0.8 * _LANE_BYTES.get(self.pcie_generation, 2e9) * self.pcie_width

    @property
    def known(self) -> GpuSpeed | None:
        """Its published speeds; None for a GPU that is not in the table."""
        return next((speed for part, speed in GPU_SPEEDS if re.search(rf"\b{part}(?!\d)", self.name)), None)


_LANE_BYTES = {1: 0.25e9, 2: 0.5e9, 3: 0.985e9, 4: 1.97e9, 5: 3.94e9, 6: 7.56e9}


@dataclass(frozen=True)
class GpuSpeed:
    """From data sheets: bytes per second of memory, dense bf16 operations per second with fp32 sums."""

    memory: float
    flops: float


# Part of the name that nvidia-smi prints -> speeds; the first that fits, with no digit behind it: "A1000".
GPU_SPEEDS: tuple[tuple[str, GpuSpeed], ...] = (
    ("RTX PRO 6000", GpuSpeed(1792e9, 250e12)),
    ("RTX 6000 Ada", GpuSpeed(960e9, 182e12)),
    ("RTX 5090", GpuSpeed(1792e9, 210e12)),
    ("RTX 5080", GpuSpeed(960e9, 112e12)),
    ("RTX 4090", GpuSpeed(1008e9, 165e12)),
    ("RTX 4080", GpuSpeed(717e9, 97e12)),
    ("RTX 4070", GpuSpeed(504e9, 58e12)),
    ("RTX 3090", GpuSpeed(936e9, 71e12)),
    ("RTX 3080", GpuSpeed(760e9, 59e12)),
    ("RTX 3060", GpuSpeed(360e9, 25e12)),
    ("H200", GpuSpeed(4800e9, 989e12)),
    ("H100", GpuSpeed(3350e9, 989e12)),
    ("A100", GpuSpeed(1555e9, 312e12)),
    ("L40", GpuSpeed(864e9, 181e12)),
    ("L20", GpuSpeed(864e9, 119e12)),
)
UNKNOWN_GPU = GpuSpeed(300e9, 25e12)
"""Low on purpose: a plan should promise little of a GPU that nobody has put into the table."""


@dataclass(frozen=True)
class MachineFacts:
    """`threads`: one per physical core allowed, fewer where a control group grants less of their time.

    `memory_bytes`, `available_bytes`: of the machine, or of the control group if it allows less. `variant`:
    of the kernels, "avx512_bf16". `gpus`: those the server may use.
    """

    cpu: str
    variant: str
    threads: int
    nodes: tuple[Node, ...]
    memory_bytes: int
    available_bytes: int
    limits: Limits
    gpus: tuple[Gpu, ...] = field(default=())
