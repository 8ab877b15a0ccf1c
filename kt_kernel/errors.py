"""The exceptions of this package.

Every one is a `KTError`, which is a `ValueError`, and carries one sentence: what is wrong, the value seen,
the value expected, what to do. Subclasses add the builtin type that a caller would expect in the same place
(`KeyError` for a missing tensor, `FileNotFoundError` for a missing path, `RuntimeError` for a wrong order of
calls).
"""

from __future__ import annotations


class KTError(ValueError):
    """Base of all errors raised by kt_kernel."""

    def __str__(self) -> str:
        # KeyError, a base of one subclass, would print the sentence in quotes with escapes.
        return str(self.args[0]) if self.args else ""


class ConfigurationError(KTError):
    """A layer or an engine was described with values that cannot work."""


class MethodError(KTError):
    """The method's name is unknown, or this build has no kernels for it."""


class FeatureUnavailableError(KTError):
    """The call exists in the interface, but not for this method or not in this build."""


class InputError(KTError):
    """A tensor given to a forward call has the wrong shape, dtype or place, or holds impossible ids."""


class CallOrderError(KTError, RuntimeError):
    """Calls came in an order that has no meaning, e.g. a forward before the weights were loaded."""


class CheckpointError(KTError):
    """A checkpoint is damaged or does not hold what the layer needs."""

    def __str__(self) -> str:
        # Names come from the file: a line break or a terminal's command among them would reach the log.
        message = super().__str__()
        return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in message)


class CheckpointPathError(CheckpointError, FileNotFoundError):
    """The checkpoint, or a file that its index names, is not there."""


class MissingTensorError(CheckpointError, KeyError):
    """A tensor that the layer needs is not in the checkpoint."""


class ConversionError(KTError):
    """A checkpoint cannot be converted as asked, or a conversion cannot go on."""
