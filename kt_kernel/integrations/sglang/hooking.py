"""Hooking into SGLang, and the proof that it took effect.

SGLang's registry logs a hook that cannot be applied and goes on; a server would then run stock code that
calls CUDA on a CPU, or gives wrong tokens. So `verify()` looks at every target itself. It runs in the
launching process before anything is started, and in each scheduler before the first layer is made.
"""

from __future__ import annotations

import functools
import logging
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kt_kernel.errors import KTError

# Not imported with this module: it serves code that is read without SGLang.
if TYPE_CHECKING:
    from sglang.srt.plugins.hook_registry import HookType

logger = logging.getLogger(__name__)


class HookError(KTError, RuntimeError):
    """A hook has no effect in this process."""


@dataclass(frozen=True)
class Hook:
    """`function` in place of `target`, or around, before or after it."""

    target: str
    kind: HookType
    function: Callable
    reason: str


_registered: list[Hook] = []


def register(hooks: tuple[Hook, ...]) -> None:
    """Hand hooks to SGLang, which applies them once all plug-ins are loaded."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    for hook in hooks:
        HookRegistry.register(hook.target, hook.function, hook.kind)
        _registered.append(hook)


def registered() -> tuple[Hook, ...]:
    """The hooks handed to SGLang in this process."""
    return tuple(_registered)


@functools.cache
def verify() -> None:
    """Raise HookError naming the hooks without effect; a second call in a process that passed costs
    nothing.
    """
    failed = [hook for hook in _registered if not in_effect(hook)]
    if failed or not _registered:
        what = (
            "; ".join(f"{hook.target} (needed because {hook.reason})" for hook in failed)
            or "none is registered"
        )
        raise HookError(
            f"the SGLang plug-in of kt-kernel could not hook into this SGLang {_sglang_version()}: "
            f"{what}. It is made "
            "for SGLang 0.5.23: install that version, or leave out --kt-weight-path."
        )
    logger.debug("all %d hooks are in effect", len(_registered))


def in_effect(hook: Hook) -> bool:
    """Does calling the target lead to our function?"""
    try:
        target = pkgutil.resolve_name(hook.target)
    except (AttributeError, ImportError):
        return False
    return any(found is hook.function for found in _reachable(target))


def _reachable(target: Any) -> Iterator[Any]:
    """The callable, what its closure holds, and the same for every function it wraps."""
    while target is not None:
        yield target
        function = getattr(target, "__func__", target)
        yield from (cell.cell_contents for cell in getattr(function, "__closure__", None) or ())
        target = getattr(target, "__wrapped__", None)


def _sglang_version() -> str:
    import sglang

    return sglang.__version__
