"""A decode step recorded once and replayed without the model's Python: what a CUDA graph is on a GPU.

While `record` runs a function, it sees every operator that torch dispatches. Native operators of ours leave
their job in the extension's recording; a replay makes those calls directly. Any other operator that computes
is called again from Python, and its results are copied to where they were. Views and fresh memory need
nothing: all tensors of the recording are kept, so every address stays right.

That holds only if the function does the same thing with the same memory each time, inputs included.
`RecordedStep.signature` says what it did: two recordings with equal signatures did the same, and what they
share (weights, caches, inputs) lies at the same addresses in both. Since the first one keeps its tensors
alive, memory that is allocated anew for each step differs, and the signatures with it.
"""

from __future__ import annotations

import contextvars
import logging
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from kt_kernel import kt_kernel_ext

logger = logging.getLogger(__name__)

# Arguments that an operator of ours does not look at: scratch memory that SGLang allocates for each step.
_UNREAD = {"sgl_kernel::decode_attention_cpu": (9,)}

# Allocate without computing.
_ALLOCATES = frozenset(
    {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided"}
)
_UNREPEATABLE = frozenset(
    {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.nondeterministic_seeded}
)


class NotRecordable(Exception):
    """The step does something that a replay could not do again; the message says what."""


_recorder: contextvars.ContextVar[_Recorder | None] = contextvars.ContextVar("_recorder", default=None)


def refuse(what: str) -> None:
    """To be called by code whose work torch does not dispatch: nothing, unless a step is being recorded."""
    recorder = _recorder.get()
    if recorder is not None:
        recorder.refused = what


@dataclass(frozen=True)
class _NativeCalls:
    """Jobs [begin, end) of the extension's recording."""

    begin: int
    end: int


@dataclass(frozen=True)
class _PythonCall:
    operator: Any
    arguments: tuple
    options: dict[str, Any]
    results: tuple[torch.Tensor, ...]  # those that are memory of their own

    def repeat(self) -> None:
        again = self.operator(*self.arguments, **self.options)
        for was, now in zip(self.results, _tensors(again), strict=False):
            was.copy_(now)


class RecordedStep:
    """What `function` did. `output` is what it returned; its tensors hold the last replay's results."""

    def __init__(self, recorder: _Recorder, output: Any) -> None:
        self.output = output
        self.signature: tuple[Hashable, ...] = tuple(recorder.signature)
        self.calls_from_python = sum(isinstance(part, _PythonCall) for part in recorder.parts)
        self._native = recorder.native
        self._parts = tuple(recorder.parts)
        self._kept = recorder.kept

    def replay(self) -> Any:
        """Do it again with what now stands in its inputs; `output`."""
        for part in self._parts:
            if isinstance(part, _NativeCalls):
                self._native.replay(part.begin, part.end)
            else:
                part.repeat()
        return self.output


def record(function: Callable[[], Any]) -> tuple[Any, RecordedStep | str]:
    """Run `function`, really. What it returned, and its recording or the reason why there is none."""
    recorder = _Recorder()
    token = _recorder.set(recorder)
    recorder.native.open()
    try:
        with recorder:
            output = function()
    finally:
        recorder.native.close()
        _recorder.reset(token)
    return output, recorder.refused or RecordedStep(recorder, output)


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, torch.Tensor)]


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.native = kt_kernel_ext.Recording()
        self.parts: list[_NativeCalls | _PythonCall] = []
        self.signature: list[Hashable] = []
        self.kept: list[torch.Tensor] = []
        self.refused: str | None = None
        self._own: dict[int, int] = {}  # storage made during the recording -> its number

    def __torch_dispatch__(
        self, operator: Any, types: Any, arguments: tuple = (), options: dict | None = None
    ):
        options = options or {}
        jobs = self.native.size
        result = operator(*arguments, **options)
        if self.refused is None:
            self._note(operator, arguments, options, result, jobs)
        return result

    def _note(self, operator: Any, arguments: tuple, options: dict, result: Any, jobs: int) -> None:
        name = operator._schema.name
        if _UNREPEATABLE.intersection(operator.tags):
            self.refused = f"it asks {name} for numbers that depend on data"
            return
        read = [a for i, a in enumerate(arguments) if i not in _UNREAD.get(name, ())]
        inputs = _tensors((read, options))
        self.signature.append((name, self._described(read), self._described(options)))
        outputs = _tensors(result)
        storages = {tensor.untyped_storage().data_ptr() for tensor in inputs}
        fresh = tuple(t for t in outputs if t.untyped_storage().data_ptr() not in storages)
        for tensor in fresh:
            self._own.setdefault(tensor.untyped_storage().data_ptr(), len(self._own))
        self.kept += inputs + outputs
        self.signature.append(self._described(outputs))
        if self.native.size > jobs:
            self._append_native(jobs, self.native.size)
        elif (fresh and name not in _ALLOCATES) or operator._schema.is_mutable:
            self.parts.append(_PythonCall(operator, arguments, options, fresh))

    def _append_native(self, begin: int, end: int) -> None:
        last = self.parts[-1] if self.parts else None
        if isinstance(last, _NativeCalls) and last.end == begin:
            self.parts[-1] = _NativeCalls(last.begin, end)
        else:
            self.parts.append(_NativeCalls(begin, end))

    def _described(self, tree: Any) -> tuple[Hashable, ...]:
        return tuple(
            self._place(leaf) if isinstance(leaf, torch.Tensor) else repr(leaf)
            for leaf in tree_flatten(tree)[0]
        )

    def _place(self, tensor: torch.Tensor) -> tuple[Hashable, ...]:
        """Which memory, in terms that are the same for the same step."""
        address = tensor.untyped_storage().data_ptr()
        own = self._own.get(address)
        where = ("external", address) if own is None else ("own", own)
        return (*where, tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), str(tensor.dtype))
