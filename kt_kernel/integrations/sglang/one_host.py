"""What the processes of a server on one host say to each other stays on that host.

Stock SGLang 0.5.23 lets a store of torch's listen on all interfaces, whose keys anybody who reaches the
machine can read and replace, and gloo on the address of the machine's name.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from kt_kernel.integrations.sglang.host_address import is_loopback

GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"
LOOPBACK = "lo"


def choose_environment(options: Any) -> None:
    """For this process and those it starts: gloo listens on the loopback interface, unless somebody chose."""
    if options.nnodes == 1:
        os.environ.setdefault(GLOO_INTERFACE, LOOPBACK)


def meeting_point(original: Callable, *, dist_port: int) -> str:
    """Around `_resolve_dist_init_method`, which lets ranks of one host meet at the address of --host."""
    from sglang.srt.environ import envs
    from sglang.srt.runtime_context import get_parallel

    parallel = get_parallel()
    if parallel.nnodes > 1 or parallel.dist_init_addr or envs.SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE.get():
        return original(dist_port=dist_port)
    return f"tcp://127.0.0.1:{dist_port}"


def store(
    original: Callable,
    hostname: str,
    port: int,
    rank: int,
    world_size: int,
    timeout: timedelta,
    use_libuv: bool = True,  # noqa: FBT001, FBT002 - torch's signature
) -> Any:
    """Around torch's `_create_c10d_store`: one for the loopback address listens there alone.

    torch's own socket is bound to all interfaces, whatever the address.
    """
    if rank != 0 or not is_loopback(hostname) or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return original(hostname, port, rank, world_size, timeout, use_libuv)
    from torch.distributed import TCPStore

    listening = _listening(hostname, port)
    return TCPStore(
        host_name=hostname,
        port=listening.getsockname()[1],
        world_size=world_size,
        is_master=True,
        timeout=timeout,
        multi_tenant=True,
        master_listen_fd=listening.detach(),
        use_libuv=use_libuv,
    )


def _listening(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(socket.SOMAXCONN)
    except OSError:
        listening.close()
        raise
    return listening
