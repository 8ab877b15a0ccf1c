"""Copying experts on a simulated bus and device: how much of the bus they get, and what overlaps.

    python bench/copying.py                    # 50 GB/s, and a host that writes 1.3 times as fast
    python bench/copying.py --bus 25 --wake-us 50

First the whole engine in real time, on a bus slow enough for this machine to write faster than it
(`--slow-bus`); the device's computing is a sleep. `ideal`: the bus is never idle; `in turn`: nothing
overlaps. Then the native pipeline with a simulated clock (tests/hybrid/simulated_bus.py): the host's own
time per expert is real, all else a parameter.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_HYBRID_TESTS = Path(__file__).resolve().parents[1] / "tests" / "hybrid"
sys.path.append(str(_HYBRID_TESTS))

from simulated_bus import METHODS, NOTHING_BUT_THE_HOST, Rates, SimulatedBus, built  # noqa: E402
from simulated_streams import SimulatedCopies, SimulatedDevice  # noqa: E402

from kt_kernel.bench.layer import RandomLayer  # noqa: E402
from kt_kernel.bench.shapes import Shape  # noqa: E402
from kt_kernel.hybrid.copies import CopyWorker  # noqa: E402
from kt_kernel.hybrid.layer import HybridLayer  # noqa: E402
from kt_kernel.hybrid.model import HybridModel  # noqa: E402
from kt_kernel.hybrid.options import HybridOptions  # noqa: E402
from kt_kernel.hybrid.slots import EMPTY, LayerPlacement, Placement  # noqa: E402
from kt_kernel.hybrid.torch_experts import TorchDeviceExperts  # noqa: E402

MEGABYTES = (1.5, 4.0, 14.0)
BUFFERS = (2, 3, 4)

# ---- the pipeline on a clock of its own ------------------------------------------------------------


def print_shares(rates: Rates, threads: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        bus = SimulatedBus(built(Path(folder) / "bus.so"), threads)
    print(f"bus {rates.bus / 1e9:.0f} GB/s, host writes {rates.write / 1e9:.0f} GB/s on {threads} threads")
    for method, copies in METHODS.items():
        host = bus.measure(method, 1.0, NOTHING_BUT_THE_HOST).host_seconds
        print(f"  {copies} copies per expert ({method}): {host * 1e6:.1f} us of the host per expert")
        for megabytes in MEGABYTES:
            shares = (
                f"{bus.measure(method, megabytes, rates, buffers).share:.0%} with {buffers}"
                for buffers in BUFFERS
            )
            print(f"    {megabytes:4.1f} MB: share of the bus {', '.join(shares)} buffers")


# ---- the engine in real time -----------------------------------------------------------------------

SHAPE = Shape("bus", hidden=2048, intermediate=512, experts=16, top_k=4)
LAYERS, SLOTS, ROWS = 4, 4, 64
DEVICE_SHARE = 0.8  # a layer's computing on the device, in times of its copying


class _PacedCopies(SimulatedCopies):
    """Copies that take the time of the bus."""

    def copy(self, to: int, source: int, size: int) -> None:
        def copy() -> None:
            begin = time.perf_counter()
            ctypes.memmove(to, source, size)
            _sleep_until(begin + size / self._device.bytes_per_second)

        self.bus.then(copy)


class _Device(SimulatedDevice):
    def __init__(self, bytes_per_second: float) -> None:
        super().__init__(seed=0, most_seconds=0.0)
        self.bytes_per_second = bytes_per_second

    def copies(self, buffers: int) -> _PacedCopies:
        return _PacedCopies(self, buffers)

    @contextmanager
    def copy_stream(self) -> Iterator[None]:
        """Copies alone are enqueued: what torch does on this thread is the host's."""
        before, self._of_thread.stream = self.current_stream(), self._copying
        try:
            yield
        finally:
            self._of_thread.stream = before


class _Slots(TorchDeviceExperts):
    """Computing takes `seconds` of the device's stream and gives nothing."""

    def __init__(self, capacity: int, encoding, device: _Device, seconds: float) -> None:
        super().__init__(capacity, SHAPE.hidden, SHAPE.intermediate, torch.bfloat16, "cpu", encoding)
        self._device, self._seconds = device, seconds

    def compute(self, hidden: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        self._device.current_stream().then(lambda: time.sleep(self._seconds))
        return torch.zeros_like(hidden)


class _Engine:
    def __init__(self, bytes_per_second: float, threads: int) -> None:
        self.device = _Device(bytes_per_second)
        self.model = HybridModel(HybridOptions(prefill_threshold=ROWS, miss_policy="auto"))
        context = self.model.context
        context.copies.close()
        context.backend, context.copies = self.device, CopyWorker(self.device)
        self.layers = [self._layer(index, threads) for index in range(LAYERS)]
        self.expert_seconds = self.layers[0].encoding.bytes / bytes_per_second
        self.compute_seconds = DEVICE_SHARE * SHAPE.experts * self.expert_seconds

    def _layer(self, index: int, threads: int) -> HybridLayer:
        wrapper = RandomLayer("BF16", SHAPE, threads=threads, max_tokens=ROWS)
        encoding = wrapper.encoding(1)

        def room(count: int) -> _Slots:
            whole_layer = count == SHAPE.experts
            return _Slots(count, encoding, self.device, self.compute_seconds if whole_layer else 0.0)

        self.compute_seconds = 0.0
        placement = LayerPlacement(Placement(0, (EMPTY,) * SLOTS, SHAPE.experts))
        return HybridLayer(index, wrapper, room(SLOTS), placement, room, self.model)

    def forward(self, rows: int, layers: int) -> None:
        ids = torch.arange(rows * SHAPE.top_k).view(rows, SHAPE.top_k) % SHAPE.experts
        for layer in self.layers[:layers]:
            layer.forward(torch.zeros(rows, SHAPE.hidden).bfloat16(), ids, torch.ones(ids.shape))
        self.device.synchronize()

    def prefill(self) -> None:
        self.model.prefill.begin_pass()
        self.forward(ROWS, LAYERS)

    def fetch(self) -> None:
        self.forward(4, 1)

    def update(self) -> None:
        layer = self.layers[0]
        slots = {expert: expert for expert in range(SLOTS)}
        self.model.context.copies.start(lambda: layer.fill_slots(slots)).result()
        self.device.synchronize()

    def fetched_bytes(self) -> int:
        return self.model.misses.bytes_copied


def print_engine(bytes_per_second: float, threads: int) -> None:
    with tempfile.TemporaryDirectory() as cache:
        os.environ["XDG_CACHE_HOME"] = cache
        engine = _Engine(bytes_per_second, threads)
        engine.model.begin_step()  # measures the speeds
    speeds = engine.model.misses._speeds
    megabytes = engine.layers[0].encoding.bytes / 1e6
    print(
        f"the engine on {bytes_per_second / 1e9:.1f} GB/s, {LAYERS} layers of {SHAPE.experts} experts of "
        f"{megabytes:.1f} MB; it measured {speeds.fetch_seconds / engine.expert_seconds:.2f} times the bus's "
        "time to fetch an expert"
    )
    layer_seconds = SHAPE.experts * engine.expert_seconds
    # The first layer is copied before anything computes, the last computes when all is copied.
    ideal = LAYERS * layer_seconds + engine.compute_seconds
    in_turn = LAYERS * (layer_seconds + engine.compute_seconds)
    print_row("layerwise prefill", best(engine.prefill), ideal, in_turn)
    before = engine.fetched_bytes()
    engine.fetch()
    bus = (engine.fetched_bytes() - before) / bytes_per_second
    if bus:
        print_row("fetching, the CPU computes", best(engine.fetch), bus, None)
    else:
        print("  fetching: at these speeds the CPU computes all experts itself, and none is fetched")
    print_row("updating", best(engine.update), SLOTS * engine.expert_seconds, None)
    engine.model.close()
    engine.device.close()


def best(work: Callable[[], None]) -> float:
    def seconds() -> float:
        begin = time.perf_counter()
        work()
        return time.perf_counter() - begin

    work()
    return min(seconds() for _ in range(3))


def print_row(what: str, seconds: float, ideal: float, in_turn: float | None) -> None:
    without = "" if in_turn is None else f", in turn {in_turn * 1e3:.0f} ms"
    print(f"  {what}: {seconds * 1e3:.1f} ms, ideal {ideal * 1e3:.1f} ms ({ideal / seconds:.0%}){without}")


def _sleep_until(moment: float) -> None:
    left = moment - time.perf_counter()
    if left > 0:
        time.sleep(left)


def main() -> None:
    default = Rates()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bus", type=float, default=default.bus / 1e9, help="GB/s")
    parser.add_argument("--write", type=float, help="GB/s that the host writes; default 1.3 times the bus")
    parser.add_argument("--call-us", type=float, default=default.call * 1e6, help="of a call of the runtime")
    parser.add_argument("--gap-us", type=float, default=default.gap * 1e6, help="of the bus before a copy")
    parser.add_argument("--wake-us", type=float, default=default.wake * 1e6, help="after waiting for a copy")
    parser.add_argument("--threads", type=int, default=2, help="that write")
    parser.add_argument("--slow-bus", type=float, default=1.0, help="GB/s of the engine in real time")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    # Before a library that stands in for the device runtime is loaded.
    print_engine(arguments.slow_bus * 1e9, arguments.threads)
    rates = Rates(
        bus=arguments.bus * 1e9,
        write=(arguments.write or 1.3 * arguments.bus) * 1e9,
        call=arguments.call_us * 1e-6,
        gap=arguments.gap_us * 1e-6,
        wake=arguments.wake_us * 1e-6,
    )
    print_shares(rates, arguments.threads)


if __name__ == "__main__":
    main()
