"""This rank's share of the CPU's experts: the policy of kt_kernel/hybrid/shares.py with SGLang's ranks."""

from __future__ import annotations

import logging
from functools import lru_cache

from kt_kernel.cpu_share import CpuShare
from kt_kernel.errors import FeatureUnavailableError
from kt_kernel.formats.cut import unit_of
from kt_kernel.hybrid.ranks import ALONE, Ranks, TorchRanks
from kt_kernel.hybrid.shares import cpu_shares, device_shares, first_alone
from kt_kernel.integrations.sglang.rank_cores import RanksHere, options_of_rank, threads_of
from kt_kernel.integrations.sglang.settings import KTSettings

logger = logging.getLogger(__name__)


def served_ranks() -> Ranks:
    """Those of this process's tensor-parallel group."""
    from sglang.srt.runtime_context import get_parallel

    group = get_parallel().tp_group
    return ALONE if group.world_size == 1 else TorchRanks(group.cpu_group)


@lru_cache
def share_of_rank(settings: KTSettings, whole: int) -> CpuShare:
    """Of layers with this intermediate size; the first call for it is collective.

    Raises FeatureUnavailableError where experts would have to be copied to another host's device, and for
    --kt-verify where rank 0 has them all.
    """
    ranks = served_ranks()
    options = options_of_rank(settings)
    copies = options.hybrid().copies_experts
    shares = first_alone(whole, ranks.size)
    if settings.shares_experts and ranks.size > 1:
        unit = whole if options.gguf_mmap else unit_of(options.method)
        threads = ranks.gather(threads_of(options).threads)
        # What --kt-verify computes again is this share of experts on the device, too.
        if copies or options.verify:
            shares = device_shares(whole, ranks.size, unit)
        else:
            shares = cpu_shares(whole, threads, unit)
    if ranks.size > 1:
        _say(shares, whole)
        if options.verify and shares[0].is_whole:
            raise FeatureUnavailableError(
                "not available yet: --kt-verify where rank 0 computes the CPU's experts for all "
                f"{ranks.size} ranks, of which none has what gives its own result; leave it out, or give "
                "--kt-cpu-ranks auto."
            )
        if copies and shares[0].is_whole:
            _check_one_host()
    return shares[ranks.rank]


def _say(shares: tuple[CpuShare, ...], whole: int) -> None:
    if shares[0].is_whole:
        logger.info("kt-kernel: rank 0 computes the experts on the CPU")
    else:
        sizes = ", ".join(str(share.size) for share in shares)
        logger.info("kt-kernel: the ranks compute %s of %d rows of every expert on the CPU", sizes, whole)


def _check_one_host() -> None:
    from sglang.srt.runtime_context import get_parallel

    hosts = RanksHere.of(get_parallel()).hosts
    if hosts > 1:
        raise FeatureUnavailableError(
            f"not available yet: rank 0 has all CPU experts, and {hosts} hosts share the model, so experts "
            "would be copied to another host's device; leave out what moves experts "
            "(--kt-gpu-prefill-token-threshold, --kt-enable-dynamic-expert-update, --kt-miss-policy auto)."
        )
