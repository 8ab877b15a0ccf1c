"""Tensors of a device that exists in tests only: what torch does with them happens in stream order.

    device = TorchDevice(fake_device.Runtime(library))
    with device.on_stream(stream.handle, torch.device("cpu")):
        c = a + b            enqueued on the stream; captured when it captures, done again at each replay

The memory is ordinary CPU memory. An operation is enqueued as a host function of the fake device runtime
(tests/kernels/fake_device.py), and its result is full of NaN, or of impossible ids, until the stream gets
there. Views are made at once. To read a value in Python is an error, as it would be in a capture.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from fake_device import Runtime, Stream
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from kt_kernel.calls.device_path import CudaRuntime

_READS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}


def poisoned(shape, dtype: torch.dtype) -> torch.Tensor:
    if dtype.is_floating_point:
        return torch.full(tuple(shape), float("nan"), dtype=dtype)
    if dtype is torch.uint8:  # the bytes of other numbers: NaN, or ids of -1
        return torch.full(tuple(shape), 255, dtype=dtype)
    return torch.full(tuple(shape), True if dtype is torch.bool else 10**2, dtype=dtype)


class OnStream(TorchDispatchMode):
    """Enqueues every torch operation of this thread on a stream instead of doing it.

    `on_host`: tensors whose operations are done at once. `note(function, arguments)`: told of all others.
    """

    def __init__(self, stream: Stream, on_host: WeakIdKeyDictionary, note=lambda function, arguments: None):
        super().__init__()
        self._stream, self._on_host, self._note = stream, on_host, note

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if tensors and all(tensor in self._on_host for tensor in tensors):
            result = func(*args, **kwargs)
            tree_map_only(torch.Tensor, lambda tensor: self._on_host.__setitem__(tensor, True), result)
            return result
        assert func not in _READS, f"{func} waits for the device"
        returned = func._schema.returns[0].alias_info
        if returned is not None and not returned.is_write:
            view = func(*args, **kwargs)
            if not isinstance(view, torch.Tensor) or _shares_memory(view, tensors):
                return view
            # What may be a view and is none, as `to` another dtype in inference mode.
            result = poisoned(view.shape, view.dtype)
            self._enqueue(func, args, lambda: _fill(result, func(*args, **kwargs)))
            return result
        if returned is not None:
            self._enqueue(func, args, lambda: func(*args, **kwargs))
            return args[0]
        result = _unfilled(func, args, kwargs, tensors)
        if "empty" not in func.overloadpacket.__name__:
            self._enqueue(func, args, lambda: _fill(result, func(*args, **kwargs)))
        return result

    def _enqueue(self, func, args, work) -> None:
        self._note(func, args)

        def quietly() -> None:
            with torch.no_grad():
                work()

        self._stream.then(quietly)


def _shares_memory(view: torch.Tensor, tensors: list[torch.Tensor]) -> bool:
    memory = view.untyped_storage().data_ptr()
    return any(tensor.untyped_storage().data_ptr() == memory for tensor in tensors)


def _unfilled(func, args, kwargs, tensors):
    """Tensors like those that `func` returns, without looking at the data of its arguments."""
    if tensors:
        args, kwargs = tree_map_only(torch.Tensor, _shape_only, (args, kwargs))
        args, kwargs = tree_map_only(torch.device, lambda _: torch.device("meta"), (args, kwargs))
    return tree_map_only(torch.Tensor, lambda t: poisoned(t.shape, t.dtype), func(*args, **kwargs))


def _shape_only(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta")


def _fill(results, values) -> None:
    for result, value in zip(tree_leaves(results), tree_leaves(values), strict=True):
        result.copy_(value)


class TorchDevice(CudaRuntime):
    """What DevicePath needs of torch, on a fake runtime; also the current stream of each device.

    `enqueued`: what torch has enqueued so far, by name; each is one host function of the runtime.
    """

    def __init__(self, runtime: Runtime, number: int = 0):
        self.runtime, self._number = runtime, number
        self._streams: dict[int, Stream] = {0: runtime.default_stream()}
        self.current = self._streams[0]
        self.allocations = 0
        self.enqueued: list[str] = []
        self._on_host = WeakIdKeyDictionary()
        self._page_locked: set[int] = set()

    def keep_on_host(self, tensor: torch.Tensor) -> None:
        """This tensor is in CPU memory, not the device's: operations on it are not enqueued."""
        self._on_host[tensor] = True

    def _note(self, function, arguments) -> None:
        name = str(function.overloadpacket)
        if function is torch.ops.aten.copy_.default:
            to, source = (t.untyped_storage().data_ptr() in self._page_locked for t in arguments[:2])
            if to or source:
                name = "copy to host" if to else "copy to device"
        self.enqueued.append(name)

    def stream(self) -> Stream:
        """A new stream, which is the current one from now on."""
        before = self.runtime.device()
        self.runtime.set_device(self._number)
        self.current = self.runtime.stream()
        self.runtime.set_device(before)
        self._streams[self.current.handle] = self.current
        return self.current

    def allocate(self, shape, dtype):
        self.runtime.call("MallocHost", self.runtime.pointer(), 1)  # forbidden in most captures
        self.allocations += 1
        with _disable_current_modes():
            memory = poisoned(shape, dtype)
        self._page_locked.add(memory.data_ptr())
        return memory

    def current_stream(self, device: torch.device) -> int:
        return self.current.handle

    @contextmanager
    def on_stream(self, stream: int, device: torch.device) -> Iterator[None]:
        before = self.runtime.device()
        self.runtime.set_device(self._number)
        try:
            with OnStream(self._streams[stream], self._on_host, self._note):
                yield
        finally:
            self.runtime.set_device(before)
