"""SGLang's CUDA code on a machine without a GPU; see cuda_code.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest


@pytest.fixture(scope="session")
def on_cuda() -> Callable[..., str]:
    """on_cuda(module, function, capability, *arguments): what the function of a module of this folder prints
    in a process that believes in a GPU of that compute capability, which it is given as "9.0".
    """
    from cuda_code import environment
    from isolation import isolated

    def run(module: str, function: str, capability: str, *arguments: str, timeout: float = 480) -> str:
        return isolated(module, function, capability, *arguments, timeout=timeout, **environment())

    return run
