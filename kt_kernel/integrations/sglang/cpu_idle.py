"""An idle server on a CPU must leave the CPU alone: stock SGLang 0.5.23 takes a whole core.

Measured on 2026-11-21 (Xeon with AMX, a tiny model, shares of one core over 20 to 30 s, all processes): 100
% as it comes; 1.1 % with --sleep-on-idle, which cpu_defaults.py turns on; 0.5 % when the process groups
also share one polling thread. Waking the scheduler every 10 s instead of every second would gain less than
0.1 %.
"""

from __future__ import annotations

import functools
import os
from datetime import timedelta
from typing import Any

import torch.distributed

from kt_kernel.integrations.sglang.host_address import host_of, own_address

# Not a name of this module: SGLang replaces the class under every name in every module.
_REAL = {"class": torch.distributed.ProcessGroupGloo}


@functools.cache
def _shared_device() -> Any:
    """On the network between the hosts, if there are several: by default gloo takes the address that the
    host's own name stands for, often a loopback one.
    """
    from sglang.srt.runtime_context import get_parallel

    create = _REAL["class"].create_device
    if interface := os.environ.get("GLOO_SOCKET_IFNAME"):
        return create(interface=interface.split(",")[0])
    parallel = get_parallel()
    if parallel.nnodes > 1 and parallel.dist_init_addr:
        return create(hostname=own_address(host_of(parallel.dist_init_addr)))
    return _REAL["class"].create_default_device()


class _LooksLikeGloo(type):
    """Calls make real ProcessGroupGloo objects, tests recognise them, attributes are the real class's."""

    def __call__(cls, store: Any, rank: int, size: int, timeout: timedelta) -> Any:
        options = _REAL["class"]._Options()
        options._devices = [_shared_device()]
        options._timeout = timeout
        return _REAL["class"](store, rank, size, options)

    def __instancecheck__(cls, candidate: Any) -> bool:
        return isinstance(candidate, _REAL["class"])

    def __getattr__(cls, name: str) -> Any:
        return getattr(_REAL["class"], name)


class SharedDeviceGloo(metaclass=_LooksLikeGloo):
    """Replaces torch's `ProcessGroupGloo` by groups on one common device.

    A gloo device owns a thread that wakes 100 times a second. SGLang makes nine groups, each with a device
    of its own by default; one device serves them all.
    """
