"""Risk: the ranks of one host meet where clients ask, and let everybody in."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from kt_kernel.integrations.sglang import one_host


def _stock(*, dist_port: int) -> str:
    return f"tcp://0.0.0.0:{dist_port}"


@pytest.mark.parametrize(
    ("nodes", "address", "expected"),
    [
        (1, None, "tcp://127.0.0.1:4000"),
        (1, "10.0.0.5:5000", "tcp://0.0.0.0:4000"),
        (2, "10.0.0.5:5000", "tcp://0.0.0.0:4000"),
    ],
)
def test_ranks_of_one_host_meet_on_the_loopback_interface(monkeypatch, nodes, address, expected):
    """Whatever --host is; where somebody named an address, it is theirs."""
    from sglang.srt import runtime_context

    parallel = SimpleNamespace(nnodes=nodes, dist_init_addr=address)
    monkeypatch.setattr(runtime_context, "get_parallel", lambda: parallel)
    assert one_host.meeting_point(_stock, dist_port=4000) == expected
