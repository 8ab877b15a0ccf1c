"""Each failure gives its sentence within seconds, and what comes after it works as before."""

from __future__ import annotations

import faulthandler
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hybrid_models import (
    DECODER_LAYERS,
    EXPERTS,
    HIDDEN,
    INTERMEDIATE,
    MOE_LAYERS,
    TOP_K,
    Engine,
    expert_weights,
    prompt,
    wait_for_copy,
)
from isolation import isolated
from safetensors.torch import save_file

from kt_kernel import KTMoEWrapper, faults, kt_kernel_ext
from kt_kernel.checkpoint.reader import open_checkpoint, release_checkpoints
from kt_kernel.errors import CheckpointError
from kt_kernel.hybrid.options import HybridOptions

HANGS_AFTER = 30  # seconds
PROMPT_TOKENS = 10


@pytest.fixture(autouse=True)
def nothing_stays_armed():
    # A hang ends the process of tests, whose output then has the stacks.
    faulthandler.dump_traceback_later(10 * HANGS_AFTER, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()
    for point in faults.POINTS:
        faults.arm(point, 0)


def masks(*experts: int) -> torch.Tensor:
    masks = torch.zeros(DECODER_LAYERS, EXPERTS, dtype=torch.bool)
    masks[:, list(experts)] = True
    return masks


def layer(threads: int = 2) -> KTMoEWrapper:
    return KTMoEWrapper(
        layer_idx=0,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        hidden_size=HIDDEN,
        moe_intermediate_size=INTERMEDIATE,
        cpuinfer_threads=threads,
        threadpool_count=1,
        weight_path="of-faults",
        chunked_prefill_size=256,
        method="BF16",
    )


def call(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.rand(tokens, EXPERTS, generator=generator).topk(TOP_K).indices
    return torch.randn(tokens, HIDDEN, generator=generator), ids, torch.full(ids.shape, 1 / TOP_K)


# ---- a layer by itself -----------------------------------------------------------------------


def test_no_memory_for_weights_and_then_there_is():
    wrapper = layer()
    faults.arm("allocation")
    with pytest.raises(MemoryError, match=r"could not reserve \d+ bytes of memory: Cannot allocate memory"):
        wrapper.load_weights_from_tensors(*expert_weights(0))
    wrapper.load_weights_from_tensors(*expert_weights(0))
    assert wrapper.forward(*call(3)).isfinite().all()


def grow_scratch() -> None:
    wrapper = layer()
    wrapper.load_weights_from_tensors(*expert_weights(0))
    small, large = call(1), call(256)
    expected = wrapper.forward(*small)
    faults.arm("allocation")
    failures = 0
    for _ in range(2):
        try:
            after = wrapper.forward(*large)
        except MemoryError as error:
            failures += 1
            assert "could not reserve" in str(error)
    assert failures == 1
    assert after.isfinite().all()
    assert torch.equal(wrapper.forward(*small), expected)


def test_no_memory_for_scratch_fails_one_call():
    """In a process of its own: engines of this one have grown so far before."""
    isolated_here("grow_scratch")


def test_a_queued_task_fails_and_the_next_does_not():
    wrapper = layer()
    wrapper.load_weights_from_tensors(*expert_weights(0))
    hidden, ids, weights = call(4)
    expected = wrapper.forward(hidden, ids, weights)
    faults.arm("queue-task", 2)
    for failing in (False, True, False):
        wrapper.submit_forward(hidden, ids, weights)
        if failing:
            with pytest.raises(RuntimeError, match="a queued task was made to fail by KT_FAULT"):
                wrapper.sync_forward(hidden)
        else:
            assert torch.equal(wrapper.sync_forward(hidden), expected)


@pytest.mark.parametrize("nth", [1, 2])
def test_a_thread_of_the_pools_cannot_start(nth):
    faults.arm("thread-start", nth)
    with pytest.raises(RuntimeError, match=rf"cannot start CPU thread {nth} of 4 \(Resource temporarily"):
        kt_kernel_ext.Engine(4)
    assert kt_kernel_ext.Engine(4).threads == 4


def start_the_queue() -> None:
    wrapper = layer(threads=1)
    wrapper.load_weights_from_tensors(*expert_weights(0))
    hidden, *rest = call(2)
    faults.arm("thread-start")
    with pytest.raises(RuntimeError, match="cannot start the thread of the task queue"):
        wrapper.submit_forward(hidden, *rest)
    wrapper.submit_forward(hidden, *rest)
    assert torch.equal(wrapper.sync_forward(hidden), wrapper.forward(hidden, *rest))


def test_the_thread_of_the_queue_cannot_start():
    """In a process of its own: the engines of this one have theirs."""
    isolated_here("start_the_queue")


def test_a_file_that_cannot_be_read(tmp_path):
    save_file({"weight": torch.zeros(4)}, tmp_path / "model.safetensors")
    faults.arm("file-read")
    with pytest.raises(CheckpointError, match=r"model.safetensors' cannot be read: Input/output error\."):
        open_checkpoint(tmp_path)
    assert list(open_checkpoint(tmp_path).names()) == ["weight"]
    release_checkpoints()


# ---- layers on CPU and device ----------------------------------------------------------------

MOVING = HybridOptions(prefill_threshold=PROMPT_TOKENS, update_interval=1, update_after_prefill=True)


def answers(engine: Engine) -> torch.Tensor:
    engine.model.begin_step()
    return engine.decoder().forward(prompt(1))


@pytest.mark.parametrize(
    ("point", "error"),
    [
        ("device-copy", r"copying expert \d+ to the device failed"),
        ("copy-job", "copying experts was made to fail"),
    ],
)
@pytest.mark.parametrize("nth", [1, 3])
def test_what_fails_on_its_way_to_the_device_fails_one_pass(point, error, nth):
    options = HybridOptions(prefill_threshold=PROMPT_TOKENS)
    with Engine(masks(1), options) as engine:
        expected = answers(engine)
        engine.model.prefill._release()  # so that every layer is copied again
        faults.arm(point, nth)
        with pytest.raises(RuntimeError, match=error):
            answers(engine)
        assert torch.equal(answers(engine), expected)


def test_an_update_that_fails_leaves_its_experts_to_the_cpu(caplog):
    with Engine(masks(1), HybridOptions(update_interval=1)) as engine:
        expected = answers(engine)
        faults.arm("copy-job")
        for _ in range(20):
            assert torch.allclose(answers(engine), expected, rtol=0.02, atol=0.02)
            wait_for_copy(engine.model.updater)
        assert any("failed; they stay on the CPU" in record.getMessage() for record in caplog.records)
        assert engine.model.updater.figures.experts_moved > 0, "the next update fills the slots"


def test_no_memory_on_the_device_leaves_long_prompts_to_both(caplog):
    with Engine(masks(1), HybridOptions(prefill_threshold=PROMPT_TOKENS)) as engine:
        faults.arm("device-memory", 2)
        first = answers(engine)
        assert engine.model.prefill.fallbacks == 1
        assert "the device has not enough free memory for 2 whole layers" in caplog.text
        assert torch.allclose(answers(engine), first, rtol=0.02, atol=0.02)
        assert engine.model.prefill.fallbacks == 1


def test_the_environment_arms_both_languages():
    isolated_here("read_the_environment", KT_FAULT="queue-task:2")
    isolated_here("ask_for_a_file", KT_FAULT="file-read")


def read_the_environment() -> None:
    wrapper = layer()
    wrapper.load_weights_from_tensors(*expert_weights(0))
    hidden, *rest = call(2)
    outcomes = []
    for _ in range(3):
        wrapper.submit_forward(hidden, *rest)
        outcomes.append(_fails(lambda: wrapper.sync_forward(hidden)))
    assert outcomes == [False, True, False], outcomes


def ask_for_a_file() -> None:
    assert _fails(lambda: open_checkpoint(__file__))


def _fails(work: Callable[[], object]) -> bool:
    try:
        work()
    except (RuntimeError, CheckpointError):
        return True
    return False


def isolated_here(function: str, **environment: str) -> None:
    here = str(Path(__file__).parent)
    isolated("test_each_fault", function, timeout=3 * HANGS_AFTER, PYTHONPATH=here, **environment)


assert len(MOE_LAYERS) > 2  # so that nth=3 is reached in one pass
