"""Which of this host's addresses the other hosts of a server know it by."""

from __future__ import annotations

import socket


def own_address(peer: str) -> str:
    """The address of this host on the way to `peer`, a name or an address; nothing is sent."""
    family, _, _, _, target = socket.getaddrinfo(peer, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(target)
        return probe.getsockname()[0]


def host_of(init_address: str) -> str:
    """The host in SGLang's --dist-init-addr."""
    from sglang.srt.utils.network import NetworkAddress

    return NetworkAddress.parse(init_address).host
