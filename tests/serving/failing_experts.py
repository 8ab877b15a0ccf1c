"""A plug-in for a test's server: when a file appears, CPU experts are asked once for one that there is not,
SGLang's own code raises, or a fault point of ours is armed (kt_kernel/faults.py).

`install` writes what makes SGLang find it beside ours; only servers with `environment` have it. The errors
are the extension's own: of a task on its threads, or of the copy of an expert to the device.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

COMPUTING, WRITING, MODEL, SAMPLER = "computing", "writing", "model", "sampler"

_FOLDER = "TEST_FAILING_EXPERTS"


def install(folder: Path) -> dict[str, str]:
    """Make `folder` a place on Python's path that holds the plug-in; returns the server's environment."""
    from plugin_folder import install_plugin

    return {**install_plugin(folder, Path(__file__)), _FOLDER: str(folder)}


def switch(folder: Path, what: str = COMPUTING) -> Path:
    """The file whose existence makes the next call fail, once."""
    return folder / f"fail-{what}"


def arm(folder: Path, point: str) -> None:
    """Let the next use of a fault point fail, from the next step on."""
    switch(folder, point).touch()


def register() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    runner = "sglang.srt.model_executor.model_runner.ModelRunner"
    for name, what in (("forward", MODEL), ("sample", SAMPLER)):
        HookRegistry.register(f"{runner}.{name}", _raising(what), HookType.BEFORE)
    HookRegistry.register(f"{runner}.forward", _arm_when_told_to, HookType.BEFORE)
    from kt_kernel.calls.cpu_path import CpuPath
    from kt_kernel.hybrid.feed import Channel

    for name in ("forward", "submit"):
        setattr(CpuPath, name, _computing(getattr(CpuPath, name)))
    for name in ("copy", "store"):
        setattr(Channel, name, _writing(getattr(Channel, name)))


def _told_to(what: str) -> bool:
    """One process of the server, where several ask at once."""
    try:
        switch(Path(os.environ[_FOLDER]), what).unlink()
    except FileNotFoundError:
        return False
    return True


def _arm_when_told_to(*_: object, **__: object) -> None:
    from kt_kernel import faults

    for point in faults.POINTS:
        # All ranks count, and the last one dies.
        if switch(Path(os.environ[_FOLDER]), point).exists() if point == "rank-death" else _told_to(point):
            faults.arm(point)


def _raising(what: str) -> Callable:
    def raise_when_told_to(*_: object, **__: object) -> None:
        if _told_to(what):
            raise IndexError(f"{what} made to fail")

    return raise_when_told_to


def _computing(original: Callable) -> Callable:
    def call(path, hidden, ids, *arguments, **options):
        if _told_to(COMPUTING):
            ids = ids.clone()
            ids[0, 0] = path._config.num_experts + 7
        return original(path, hidden, ids, *arguments, **options)

    return call


def _writing(original: Callable) -> Callable:
    def call(channel, wrapper, experts, *arguments):
        if _told_to(WRITING):
            experts = [wrapper.num_experts + 7, *experts[1:]]
        return original(channel, wrapper, experts, *arguments)

    return call
