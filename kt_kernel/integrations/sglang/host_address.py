"""Which of this host's addresses the other hosts of a server know it by."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import socket
from typing import Any

logger = logging.getLogger(__name__)

_SAID = ("SGLANG_HOST_IP", "HOST_IP")  # what SGLang takes instead of the address of the first network


def choose(options: Any) -> None:
    """For this process and its children: SGLang's ranks meet on the network of --dist-init-addr. `options`:
    SGLang's.
    """
    if options.nnodes == 1 or not options.dist_init_addr or any(map(os.environ.get, _SAID)):
        return
    peer = host_of(options.dist_init_addr)
    with contextlib.suppress(OSError):  # SGLang says what is wrong with such a name
        address = own_address(peer)
        if ipaddress.ip_address(address).is_loopback and not is_loopback(peer):
            logger.warning(
                "%s is %s on this host (/etc/hosts?), where no other host reaches it; SGLang chooses an "
                "address, or set %s",
                peer,
                address,
                _SAID[0],
            )
            return
        os.environ[_SAID[0]] = address
        logger.info("the hosts know this one as %s; set %s to change that", address, _SAID[0])


def own_address(peer: str) -> str:
    """The address of this host on the way to `peer`, a name or an address; nothing is sent."""
    family, _, _, _, target = socket.getaddrinfo(peer, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(target)
        return probe.getsockname()[0]


def is_loopback(host: str) -> bool:
    """Whether somebody wrote a loopback address, and not a name that stands for one here."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def host_of(init_address: str) -> str:
    """The host in SGLang's --dist-init-addr."""
    from sglang.srt.utils.network import NetworkAddress

    return NetworkAddress.parse(init_address).host
