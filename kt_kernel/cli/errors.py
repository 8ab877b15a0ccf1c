"""The error of a command that cannot do what was asked."""

from __future__ import annotations

from kt_kernel.errors import KTError


class CommandError(KTError):
    """Raised by the commands themselves; shown, like every `KTError`, as one sentence."""
