"""The native pipeline on a simulated bus (simulated_bus.c): what share of it do experts of a size get?

    bus = SimulatedBus(built(Path("bus.so")))
    figures = bus.measure("BF16", megabytes=4.0, rates=Rates())

A real layer of small experts is written by the real pipeline on the engine's threads; the simulation lets
each expert have `megabytes` on the bus, and lets the host write that many at `Rates.write`. So what is real
is all that the host does per expert beside writing its bytes. Loads a library that stands in for the device
runtime: in a process of its own.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from ctypes import byref, c_double, c_long
from dataclasses import dataclass
from pathlib import Path

import torch

from kt_kernel import KTMoEWrapper, kt_kernel_ext
from kt_kernel.hybrid.feed import BUFFERS

_SOURCE = Path(__file__).parent / "simulated_bus.c"
METHODS = {"BF16": 2, "FP8": 4}  # and the copies of an expert: its weights; these and their scales
_EXPERTS, _SIZE = 128, 32
_REPEATS = 40  # a run takes less than a millisecond


def built(library: Path) -> Path:
    """Compile the simulated runtime."""
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))))
    flags = ["-shared", "-fPIC", "-O1", "-Wall", "-Wextra"]
    subprocess.run([compiler, *flags, "-o", library, _SOURCE], check=True)
    return library


@dataclass(frozen=True)
class Rates:
    """Bytes per second and seconds. `call`: of the host, for each call that enqueues or asks; `gap`: of the
    bus, before each copy; `wake`: of a thread that waited for an event.

    The seconds are those of CUDA on a current server, from what is published; no GPU was at hand.
    """

    bus: float = 50e9
    write: float = 1.3 * 50e9
    call: float = 2e-6
    gap: float = 1e-6
    wake: float = 20e-6


NOTHING_BUT_THE_HOST = Rates(bus=1e30, write=1e30, call=0.0, gap=0.0, wake=0.0)


@dataclass(frozen=True)
class Figures:
    share: float  # of the time until all is copied, the bus carried bytes
    host_seconds: float  # per expert, until the last was enqueued
    copies: float  # per expert


class SimulatedBus:
    """`threads`: of the engine that writes."""

    def __init__(self, library: Path, threads: int = 1) -> None:
        self._library = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        self._library.bus_begin.argtypes = [c_double] * 7
        self._layers = {method: _small_layer(method, threads) for method in METHODS}

    def measure(self, method: str, megabytes: float, rates: Rates, buffers: int = BUFFERS) -> Figures:
        """The best of several layers of experts that are stored as `method` and go to slots as they are."""
        runs = [self._run(method, megabytes, rates, buffers) for _ in range(_REPEATS)]
        return min(runs, key=lambda figures: figures.host_seconds - figures.share)

    def _run(self, method: str, megabytes: float, rates: Rates, buffers: int) -> Figures:
        layer = self._layers[method]
        encoding = layer.encoding(1)
        memory = torch.zeros(buffers * encoding.bytes, dtype=torch.uint8)
        slot = torch.zeros(encoding.bytes, dtype=torch.uint8)
        addresses = [0 if part is None else part.data_ptr() for part in encoding.views(slot)]
        destinations = torch.tensor([addresses] * _EXPERTS)
        pipeline = kt_kernel_ext.ExpertPipeline(
            image_bytes=encoding.bytes,
            parts=encoding.spans,
            buffers=buffers,
            rank=0,
            memory=memory.data_ptr(),
            counters=0,
            pids=[os.getpid()],
        )
        copies = kt_kernel_ext.StreamCopies(buffers)
        scale = megabytes * 1e6 / sum(size for _, size in encoding.spans)
        self._library.bus_begin(
            rates.bus, rates.write, rates.call, rates.gap, rates.wake, megabytes * 1e6, scale
        )
        pipeline.run(
            layer.moe, layer.global_scales.data_ptr(), range(_EXPERTS), destinations.data_ptr(), copies
        )
        seconds, busy, host, count = c_double(), c_double(), c_double(), c_long()
        self._library.bus_end(byref(seconds), byref(busy), byref(host), byref(count))
        return Figures(busy.value / seconds.value, host.value / _EXPERTS, count.value / _EXPERTS)


def _small_layer(method: str, threads: int) -> KTMoEWrapper:
    layer = KTMoEWrapper(
        layer_idx=0,
        num_experts=_EXPERTS,
        num_experts_per_tok=1,
        hidden_size=_SIZE,
        moe_intermediate_size=_SIZE,
        cpuinfer_threads=threads,
        threadpool_count=1,
        chunked_prefill_size=1,
        method=method,
    )
    layer.load_weights_from_tensors(*torch.zeros(3, _EXPERTS, _SIZE, _SIZE, dtype=torch.bfloat16))
    return layer
