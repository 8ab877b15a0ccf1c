"""A server that everybody on the network can use should have been meant to be one."""

from __future__ import annotations

import ipaddress


def exposure_warning(host: str | None, has_key: bool) -> str | None:
    """A sentence if a server at `host` answers other machines without a key, else None."""
    if has_key or host in (None, "localhost"):
        return None
    try:
        if ipaddress.ip_address(host).is_loopback:
            return None
    except ValueError:
        pass  # a name: it may lead anywhere
    return (
        f"--host {host} without --api-key-file: whoever reaches this machine can use the server, and change "
        "it; give a key, or keep to 127.0.0.1 and a tunnel (doc/clients.md)"
    )
