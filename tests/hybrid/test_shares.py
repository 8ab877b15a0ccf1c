"""Who computes which rows: nobody twice, nobody none, blocks whole, and as much as the threads can."""

import pytest

from kt_kernel.cpu_share import CpuShare
from kt_kernel.hybrid.shares import cpu_shares, device_shares, first_alone


def _sizes(whole, threads, unit):
    return _sizes_of(cpu_shares(whole, threads, unit), whole)


def _sizes_of(shares, whole):
    assert [share.begin for share in shares] == [0, *(share.end for share in shares[:-1])]
    assert shares[-1].end == whole or shares == first_alone(whole, len(shares))
    return [share.size for share in shares]


@pytest.mark.parametrize(
    ("whole", "threads", "unit", "sizes"),
    [
        (2048, [8, 8], 128, [1024, 1024]),  # DeepSeek-V3 in FP8
        (768, [4, 4], 128, [384, 384]),  # Qwen3-30B
        (768, [4, 4], 256, [512, 256]),  # the same in K-quants: three blocks
        (1408, [1, 1], 128, [768, 640]),  # eleven blocks
        (2048, [24, 8], 128, [1536, 512]),  # uneven hosts
        (2048, [1] * 16, 128, [128] * 16),
        (2000, [1, 1], 128, [1024, 976]),  # a ragged last block
    ],
)
def test_shares_are_in_proportion_to_the_threads(whole, threads, unit, sizes):
    assert _sizes(whole, threads, unit) == sizes


def test_groups_of_128_stay_whole_where_that_costs_nothing():
    assert _sizes(1536, [3, 2], 32) == [896, 640]
    assert _sizes(320, [1, 1], 32) == [160, 160]


@pytest.mark.parametrize("threads", [[1] * 4, [4, 1, 1, 1]])
def test_fewer_blocks_than_ranks_stay_with_the_first(threads):
    assert _sizes(768, threads, 256) == [768, 0, 0, 0]


def test_what_is_copied_to_devices_is_cut_as_theirs_or_not_at_all():
    assert _sizes_of(device_shares(2048, 2, 128), 2048) == [1024, 1024]
    assert _sizes_of(device_shares(1408, 2, 128), 1408) == [1408, 0]


def test_one_rank_has_everything():
    assert cpu_shares(100, [4], 32) == (CpuShare.everything(100),)
