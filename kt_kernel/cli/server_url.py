"""How a server is addressed."""

from __future__ import annotations


def base_url(host: str, port: int | str) -> str:
    """http://host:port, with the brackets that an IPv6 address needs."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
