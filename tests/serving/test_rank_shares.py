"""What the ranks' shares of the CPU's experts rule out is refused, not left undone without a word."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from kt_kernel.errors import FeatureUnavailableError
from kt_kernel.hybrid.options import HybridOptions
from kt_kernel.integrations.sglang import cpu_shares


class _Settings:
    shares_experts = False


def share(monkeypatch, ranks: int, verify: int):
    options = SimpleNamespace(verify=verify, hybrid=lambda: HybridOptions(verify_every=verify))
    monkeypatch.setattr(cpu_shares, "served_ranks", lambda: SimpleNamespace(size=ranks, rank=ranks - 1))
    monkeypatch.setattr(cpu_shares, "options_of_rank", lambda _: options)
    return cpu_shares.share_of_rank(_Settings(), 128)


def test_verifying_is_refused_where_rank_0_computes_for_all(monkeypatch):
    with pytest.raises(
        FeatureUnavailableError, match=r"--kt-verify where rank 0 computes .* for all 2 ranks"
    ):
        share(monkeypatch, ranks=2, verify=5)
    assert share(monkeypatch, ranks=2, verify=0).size == 0
    assert share(monkeypatch, ranks=1, verify=5).size == 128
