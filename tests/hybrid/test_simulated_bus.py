"""Risk: the host's work per expert leaves the bus idle, and long prompts wait for it.

On a simulated bus (simulated_bus.py): figures of a model, of which only the host's own work is real.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from isolation import isolated

HOST_SECONDS = 25e-6  # per expert, with a wide margin: Python took 100 us and more


def shares_of_the_bus(library: str, threads: str) -> None:
    from simulated_bus import METHODS, NOTHING_BUT_THE_HOST, Rates, SimulatedBus, built

    bus = SimulatedBus(built(Path(library)), int(threads))
    for method, copies in METHODS.items():
        host = bus.measure(method, 1.0, NOTHING_BUT_THE_HOST)
        assert host.copies == copies
        assert 0 < host.host_seconds < HOST_SECONDS, f"{method}: {host}"
        for megabytes, least in ((1.5, 0.7), (4.0, 0.9), (14.0, 0.9)):
            figures = bus.measure(method, megabytes, Rates())
            assert least <= figures.share < 1, f"{method}, {megabytes} MB: {figures}"
        slow = bus.measure(method, 4.0, Rates(write=25e9))
        assert slow.share < 0.55, "the host writes half as fast as the bus copies, and nobody notices"
        alone = bus.measure(method, 4.0, Rates(), buffers=1)
        assert alone.share < 0.6, "with one buffer nothing overlaps, and nobody notices"


@pytest.mark.alone
@pytest.mark.parametrize("threads", ["1", "2"])
def test_copies_keep_the_bus_busy(tmp_path, threads):
    isolated_here("shares_of_the_bus", str(tmp_path / "bus.so"), threads)


def isolated_here(function: str, *arguments: str) -> None:
    isolated(Path(__file__).stem, function, *arguments, PYTHONPATH=str(Path(__file__).parent))
