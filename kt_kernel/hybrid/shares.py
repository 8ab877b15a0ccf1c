"""How the experts on the CPU are shared out over the ranks of a model (tensor parallelism).

By rows of the intermediate size, not by experts. A token chooses k experts at random: of 8, two ranks with
half of the experts each get 5.1 and 2.9 on average, so the slower one takes 1.27 times its half, and the
slowest of four 1.77 times its quarter (expectations of the largest part of a multinomial). Cut by rows every
rank reads its part of each of the 8, whatever was chosen, and nothing has to be decided when experts move.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from kt_kernel.cpu_share import CpuShare

AUTO, FIRST = CPU_RANKS = ("auto", "first")

# Columns of the largest group of published 4-bit formats: parts cut at multiples of it keep their groups.
_USUAL_GROUP = 128


def first_alone(whole: int, ranks: int) -> tuple[CpuShare, ...]:
    """Rank 0 has everything."""
    return (CpuShare.everything(whole), *[CpuShare.nothing(whole)] * (ranks - 1))


def cpu_shares(whole: int, threads: Sequence[int], unit: int) -> tuple[CpuShare, ...]:
    """Each rank's share of an intermediate size of `whole`, in the ranks' order; all of it together.

    `threads`: those that each rank computes with. A cut falls on multiples of `unit`; where there are fewer
    of these than ranks, rank 0 has everything.
    """
    ranks = len(threads)
    if whole % (ranks * unit) and whole // unit < ranks:
        return first_alone(whole, ranks)
    coarse = math.lcm(unit, _USUAL_GROUP)
    if whole % (ranks * coarse) == 0:
        unit = coarse
    units, total = -(-whole // unit), sum(threads)
    return _between(
        [min(whole, unit * round(units * sum(threads[:rank]) / total)) for rank in range(ranks + 1)]
    )


def device_shares(whole: int, ranks: int, unit: int) -> tuple[CpuShare, ...]:
    """As `cpu_shares`, where experts are copied from CPU memory to the devices while serving.

    Each rank's share is its device's shard, and goes no further; all are equal. Where that cannot be, rank 0
    has everything.
    """
    if whole % (ranks * unit):
        return first_alone(whole, ranks)
    return _between([rank * whole // ranks for rank in range(ranks + 1)])


def _between(edges: Sequence[int]) -> tuple[CpuShare, ...]:
    return tuple(CpuShare(begin, end, edges[-1]) for begin, end in itertools.pairwise(edges))
