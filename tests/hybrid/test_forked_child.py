"""Risk: a forked child inherits layers whose threads it does not have, and its calls wait for ever."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from isolation import isolated

_SECONDS = 60  # of a child that should end at once


def _calls() -> dict[str, Callable[[], object]]:
    """What a child may try, by name, on layers that its parent made and used."""
    from hybrid_models import EXPERTS, HIDDEN, INTERMEDIATE, TOP_K, expert_weights, wrappers

    from kt_kernel.hybrid.copies import CopyWorker
    from kt_kernel.hybrid.device import CpuBackend
    from kt_kernel.hybrid.feed import Channel, ExpertFeed
    from kt_kernel.hybrid.ranks import ALONE
    from kt_kernel.hybrid.torch_experts import TorchDeviceExperts

    wrapper = wrappers(0)[0]
    encoding, backend = wrapper.encoding(1), CpuBackend(torch.device("cpu"))
    image = encoding.views(torch.zeros(encoding.bytes, dtype=torch.uint8))
    feed = ExpertFeed(wrapper, encoding, Channel(encoding, ALONE, backend))
    decoded, plain = (
        TorchDeviceExperts(2, HIDDEN, INTERMEDIATE, dtype, "cpu", encoding)
        for dtype in (torch.float32, torch.bfloat16)
    )
    copies = CopyWorker(backend)
    copies.start(lambda: None).result()
    call = torch.ones(2, HIDDEN), torch.arange(2 * TOP_K).view(2, TOP_K) % EXPERTS, torch.ones(2, TOP_K)
    wrapper.forward(*call)
    wrapper.submit_forward(*call)
    wrapper.sync_forward(call[0])
    return {
        "forward": lambda: wrapper.forward(*call),
        "submit": lambda: wrapper.submit_forward(*call),
        "sync": lambda: wrapper.cpu_infer.sync(0),
        "write": lambda: wrapper.write_expert(0, [image]),
        "queued write": lambda: wrapper.submit_write_weight_scale_to_buffer(
            1, 0, *([part.data_ptr() if part is not None else 0] for part in image[:4])
        ),
        "load": lambda: wrapper.load_weights_from_tensors(*expert_weights(0)),
        "fill": lambda: feed.fill(plain, {0: 0, 1: 1}),
        "fill, decoding": lambda: feed.fill(decoded, {0: 0, 1: 1}),
        "copy": lambda: copies.start(lambda: None).result(),
    }


def _fork(child: Callable[[], object]) -> int:
    """The exit status of a process that does `child`: -SIGALRM if that does not end in time."""
    process = os.fork()
    if process == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(_SECONDS)
        try:
            child()
            os._exit(0)
        except BaseException as error:
            print(type(error).__name__, error, flush=True)
            os._exit(2 if "forked child" in str(error) and isinstance(error, RuntimeError) else 1)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def calls_are_errors() -> None:
    calls = _calls()
    for name, call in calls.items():
        assert _fork(call) == 2, f"{name} is no clear error in a forked child"
        call()
        if name == "submit":
            calls["sync"]()


def layers_can_be_dropped() -> None:
    from hybrid_models import wrappers

    _calls()

    def drop() -> None:
        wrappers.cache_clear()
        gc.collect()

    assert _fork(drop) == 0


def another_layer_can_be_made() -> None:
    from hybrid_models import wrappers

    _calls()

    def use_another() -> None:
        wrappers.cache_clear()
        _calls()

    assert _fork(use_another) == 0


@pytest.mark.parametrize("what", [calls_are_errors, layers_can_be_dropped, another_layer_can_be_made])
def test_forked_child(what):
    here = Path(__file__).parent
    isolated(
        Path(__file__).stem,
        what.__name__,
        timeout=480,
        PYTHONPATH=os.pathsep.join([str(here), str(here.parent / "api")]),
    )
