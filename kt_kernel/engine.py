"""The process's CPU engines: thread pools shared by all layers that ask for the same threads.

Layers with the same (threads, subpools, numa_nodes) share one engine, and layers that ask for something
else get another: a request is never answered with an engine of a different shape. An engine lives as
long as a layer holds it.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Sequence

from kt_kernel import kt_kernel_ext
from kt_kernel.errors import ConfigurationError

logger = logging.getLogger(__name__)

_lock = threading.Lock()
_engines: weakref.WeakValueDictionary[tuple, kt_kernel_ext.Engine] = weakref.WeakValueDictionary()


def get_engine(
    threads: int, subpools: int = 1, numa_nodes: Sequence[int] | None = None
) -> kt_kernel_ext.Engine:
    """The engine with exactly these threads, built on first use.

    `threads` is the total, shared out over `subpools`; `numa_nodes` names the node of each subpool (default
    0, 1, ...). Raises ConfigurationError for impossible values.
    """
    if threads < 1:
        raise ConfigurationError(f"cpuinfer_threads is {threads}, but at least 1 thread must compute.")
    if not 1 <= subpools <= threads:
        raise ConfigurationError(
            f"threadpool_count is {subpools}, but it must be between 1 and cpuinfer_threads ({threads})."
        )
    if numa_nodes is not None and len(numa_nodes) != subpools:
        raise ConfigurationError(
            f"numa_nodes names {len(numa_nodes)} nodes ({list(numa_nodes)}), but threadpool_count is "
            f"{subpools}; name one node for each pool."
        )
    nodes = None if numa_nodes is None else [int(node) for node in numa_nodes]
    # A forked child inherits this dictionary but none of the threads, so the process is part of the key.
    key = (os.getpid(), threads, subpools, None if nodes is None else tuple(nodes))
    with _lock:
        engine = _engines.get(key)
        if engine is None:
            try:
                kt_kernel_ext.cpu_features()  # an unknown KT_KERNEL_CPU_VARIANT stops here, before any load
                engine = kt_kernel_ext.Engine(threads, subpools, nodes)
            except ValueError as error:
                raise ConfigurationError(str(error)) from error
            for warning in engine.warnings:
                logger.warning("%s", warning)
            _engines[key] = engine
    return engine
