"""Risk: on a device's streams an expert is overwritten before it is copied, or used before it is there.

The pipeline on the fake device runtime (tests/kernels/fake_device.py), whose streams are held back where a
mistake would show. Each scene is a process of its own, because a loaded runtime cannot be unloaded.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from pathlib import Path

import pytest
import torch
from isolation import isolated

_FAILURE = 700  # cudaErrorIllegalAddress, which ends all work of a process


class _Scene:
    """A pipeline over a layer of eight experts, on two streams of the fake runtime."""

    def __init__(self, library: str) -> None:
        from fake_device import Runtime, built
        from hybrid_models import EXPERTS, wrappers

        from kt_kernel import kt_kernel_ext
        from kt_kernel.hybrid.feed import BUFFERS

        self.bus, self.user = self._streams = [Runtime(built(Path(library))).stream() for _ in range(2)]
        self.wrapper = wrappers(0)[0]
        self.encoding = self.wrapper.encoding(1)
        self.size, self.buffers = self.encoding.bytes, BUFFERS
        self.host = torch.zeros(BUFFERS, self.size, dtype=torch.uint8)
        self.pipeline = kt_kernel_ext.ExpertPipeline(
            image_bytes=self.size,
            parts=self.encoding.spans,
            buffers=BUFFERS,
            rank=0,
            memory=self.host.data_ptr(),
            counters=0,
            pids=[os.getpid()],
        )
        self.copies = kt_kernel_ext.StreamCopies(BUFFERS)
        self.source = (self.wrapper.moe, self.wrapper.global_scales.data_ptr())
        self.experts = [expert % EXPERTS for expert in range(3 * BUFFERS)]
        self.arrived = torch.zeros(len(self.experts), self.size, dtype=torch.uint8)

    def run(self) -> None:
        """The experts, each to its place in `arrived`."""
        self.copies.use_streams(self.bus.handle, self.bus.handle)
        addresses = [
            [0 if part is None else part.data_ptr() for part in self.encoding.views(image)]
            for image in self.arrived
        ]
        destinations = torch.tensor(addresses)
        self.pipeline.run(*self.source, self.experts, destinations.data_ptr(), self.copies)

    def check(self) -> None:
        for expert, image in zip(self.experts, self.arrived, strict=True):
            expected = self.encoding.views(torch.zeros(self.size, dtype=torch.uint8))
            self.wrapper.write_expert(expert, [expected])
            for part, right in zip(self.encoding.views(image), expected, strict=True):
                assert part is right is None or torch.equal(part, right), f"expert {expert}"


def straight_to_their_places(library: str) -> None:
    scene = _Scene(library)
    scene.bus.hold()
    runner = threading.Thread(target=scene.run)
    runner.start()
    while scene.pipeline.passed < scene.buffers:
        time.sleep(0.001)
    time.sleep(0.05)
    assert scene.pipeline.passed == scene.buffers, "a buffer was written before it was copied"
    assert not scene.arrived.any()
    scene.bus.release()
    runner.join()
    scene.bus.wait()
    scene.check()


def through_the_devices_memory(library: str) -> None:
    scene = _Scene(library)
    scene.copies.use_streams(scene.bus.handle, scene.user.handle)
    staging = torch.zeros(scene.buffers, scene.size, dtype=torch.uint8)
    run = scene.pipeline.start(*scene.source, scene.experts, staging.data_ptr(), scene.copies)
    for number, place in enumerate(scene.arrived):
        # A stream that is held in front of what earlier experts need would hold up this one, for ever: the
        # pipeline writes into a host buffer only when that was copied.
        scene.user.wait()
        held = (scene.bus, scene.user)[number % 2]
        held.hold()
        buffer = run.next()
        assert buffer == number % scene.buffers
        to, source = place.data_ptr(), staging[buffer].data_ptr()
        scene.user.then(lambda to=to, source=source: ctypes.memmove(to, source, scene.size))
        run.used()
        if number % 3 == 0:
            time.sleep(0.02)  # time for mistakes
        held.release()
    assert run.next() == -1
    run.finish()
    scene.user.wait()
    scene.check()


def given_up_half_way(library: str) -> None:
    scene = _Scene(library)
    scene.copies.use_streams(scene.bus.handle, scene.user.handle)
    staging = torch.zeros(scene.buffers, scene.size, dtype=torch.uint8)
    run = scene.pipeline.start(*scene.source, scene.experts, staging.data_ptr(), scene.copies)
    run.next()
    del run
    assert scene.pipeline.passed == len(scene.experts)
    scene.run()
    scene.bus.wait()
    scene.check()


def a_copy_fails(library: str) -> None:
    scene = _Scene(library)
    scene.bus.fail_with(_FAILURE)
    with pytest.raises(RuntimeError, match=f"copying an expert to the device .*{_FAILURE}"):
        scene.run()
    assert scene.pipeline.passed == len(scene.experts), "other ranks count on all experts"
    scene.bus.fail_with(0)
    scene.run()
    scene.bus.wait()
    scene.check()


@pytest.mark.alone  # it gives mistakes 20 to 50 ms to show, and failed once beside another process of tests
@pytest.mark.parametrize(
    "scene", [straight_to_their_places, through_the_devices_memory, given_up_half_way, a_copy_fails]
)
def test_stream_copies(scene, tmp_path):
    here = Path(__file__).parent
    isolated(
        Path(__file__).stem,
        scene.__name__,
        str(tmp_path / "library.so"),
        PYTHONPATH=os.pathsep.join([str(here), str(here.parent / "api")]),
    )
