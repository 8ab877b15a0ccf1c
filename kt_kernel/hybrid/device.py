"""All that differs between a CPU and a CUDA device: host memory, streams, events, capture."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch

from kt_kernel import kt_kernel_ext

logger = logging.getLogger(__name__)

_CAPTURES_OF_OTHER_THREADS_DO_NOT_MATTER = 1  # cudaStreamCaptureModeThreadLocal


def is_out_of_memory(error: Exception) -> bool:
    """Had a device, or the CPU in the place of one, no memory left?"""
    # On a CPU torch raises a plain RuntimeError.
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)


class Event(Protocol):
    """A point in the work of the stream on which it was recorded."""

    def wait(self) -> None:
        """Let the current stream wait for it."""
        ...

    def synchronize(self) -> None:
        """Let this thread wait for it."""
        ...


class Backend(Protocol):
    device: torch.device

    def host_memory(self, size: int) -> torch.Tensor:
        """uint8 [size] from which copies to the device need not wait."""
        ...

    def page_lock(self, memory: torch.Tensor) -> None:
        """Make existing host memory such, if possible; it must stay alive until the process ends."""
        ...

    def begin_copying_thread(self) -> None:
        """To be called by a thread that will copy beside the one that serves, before anything else."""
        ...

    def synchronize(self) -> None:
        """Let this thread wait for all work given to the device."""
        ...

    def copy_stream(self) -> AbstractContextManager:
        """Work that this thread issues inside runs beside that of its other streams."""
        ...

    def record(self) -> Event:
        """The point that the current stream has reached."""
        ...

    def copies(self, buffers: int) -> kt_kernel_ext.DeviceCopies:
        """What copies from `buffers` host buffers to the device; `direct` or `beside` says in which order."""
        ...

    def direct(self, copies: kt_kernel_ext.DeviceCopies) -> None:
        """Let later copies be in the order of the current stream."""
        ...

    def beside(self, copies: kt_kernel_ext.DeviceCopies) -> None:
        """Let later copies run beside the current stream, which uses what they bring."""
        ...

    def capturing(self) -> bool:
        """Is this thread's work being recorded into a graph instead of done?"""
        ...

    def release_memory(self) -> None:
        """Give memory of freed tensors back to the device."""
        ...


class _Done:
    """On a CPU, what was called has been done."""

    def wait(self) -> None:
        return None

    def synchronize(self) -> None:
        return None


class CpuBackend:
    def __init__(self, device: torch.device) -> None:
        self.device = device

    def host_memory(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8)

    def page_lock(self, memory: torch.Tensor) -> None:
        return None

    def begin_copying_thread(self) -> None:
        return None

    def synchronize(self) -> None:
        return None

    def copy_stream(self) -> AbstractContextManager:
        return nullcontext()

    def record(self) -> Event:
        return _Done()

    def copies(self, buffers: int) -> kt_kernel_ext.DeviceCopies:
        return kt_kernel_ext.HostCopies()

    def direct(self, copies: kt_kernel_ext.DeviceCopies) -> None:
        return None

    def beside(self, copies: kt_kernel_ext.DeviceCopies) -> None:
        return None

    def capturing(self) -> bool:
        return False

    def release_memory(self) -> None:
        return None


class CudaBackend:
    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream: torch.cuda.Stream | None = None
        self._bus: torch.cuda.Stream | None = None

    def host_memory(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def page_lock(self, memory: torch.Tensor) -> None:
        status = kt_kernel_ext.page_lock(memory.data_ptr(), memory.numel())
        if status:
            logger.warning(
                "%d bytes of host memory could not be page-locked (CUDA error %d): copies of experts from it "
                "will wait for the device; raise the limit of locked memory",
                memory.numel(),
                status,
            )

    def begin_copying_thread(self) -> None:
        # By default no thread may allocate memory or wait for an event while any other captures a graph.
        kt_kernel_ext.exchange_capture_mode(_CAPTURES_OF_OTHER_THREADS_DO_NOT_MATTER)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def copy_stream(self) -> AbstractContextManager:
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)
        return torch.cuda.stream(self._stream)

    def record(self) -> Event:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return _CudaEvent(event, self.device)

    def copies(self, buffers: int) -> kt_kernel_ext.DeviceCopies:
        with torch.cuda.device(self.device):
            return kt_kernel_ext.StreamCopies(buffers)

    def direct(self, copies: kt_kernel_ext.StreamCopies) -> None:
        stream = torch.cuda.current_stream(self.device).cuda_stream
        copies.use_streams(stream, stream)

    def beside(self, copies: kt_kernel_ext.StreamCopies) -> None:
        if self._bus is None:
            self._bus = torch.cuda.Stream(self.device)
        copies.use_streams(self._bus.cuda_stream, torch.cuda.current_stream(self.device).cuda_stream)

    def capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def release_memory(self) -> None:
        torch.cuda.empty_cache()


class _CudaEvent:
    def __init__(self, event: torch.cuda.Event, device: torch.device) -> None:
        self._event = event
        self._device = device

    def wait(self) -> None:
        self._event.wait(torch.cuda.current_stream(self._device))

    def synchronize(self) -> None:
        self._event.synchronize()


def log_signals() -> None:
    """Find out how captured graphs of the current device and the CPU will meet, and say so.

    Otherwise the first call that the device makes finds out, which may be in a capture.
    """
    signals = kt_kernel_ext.device_signals()
    logger.info("captured graphs call the CPU through %s: %s", signals["kind"], signals["reason"])


def backend_of(device: torch.device) -> Backend:
    """How to work with `device`: cuda, or anything else as a CPU."""
    return CudaBackend(device) if device.type == "cuda" else CpuBackend(device)
