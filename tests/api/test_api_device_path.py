"""The accelerator's path with a stand-in for its runtime: what is enqueued, in what order, in which memory.

The stand-in's stream runs each callback at once, on the engine's real queue.
"""

from contextlib import nullcontext

import pytest
import torch
from api_support import (
    EXPERTS,
    HIDDEN,
    TOP_K,
    assert_close,
    loaded_wrapper,
    random_call,
    random_experts,
    reference,
)
from test_api_deferral import slow_rule

from kt_kernel.calls.buffers import BufferCache, BufferKey
from kt_kernel.calls.device_path import DevicePath
from kt_kernel.device_ops import block
from kt_kernel.device_ops.routing import Split
from kt_kernel.errors import CallOrderError, ConfigurationError, InputError

_EXPERTS = [random_experts(seed=20 + number) for number in range(3)]
_STREAM = 77


class Runtime:
    """Ordinary memory instead of page-locked, poisoned so that a row nobody wrote shows."""

    def __init__(self):
        self.allocated = []

    def page_locked(self, shape, dtype):
        poison = float("nan") if dtype.is_floating_point else 255
        self.allocated.append(torch.full(shape, poison, dtype=dtype))
        return self.allocated[-1]

    def capture_id(self, stream):
        return None

    def current_stream(self, device):
        return _STREAM

    def on_stream(self, stream, device):
        assert stream == _STREAM
        return nullcontext()


class Stream:
    """Stands in for the extension's stream calls; its log tells the order of tasks and waits."""

    def __init__(self, wrapper):
        self.engine, self.native, self.log = wrapper.cpu_infer, wrapper.moe, []

    def submit_on_stream(
        self, stream, *arguments, keep_alive, deferred_ids_ptr=None, deferred_output_ptr=None
    ):
        assert stream == _STREAM
        self.log.append(("submit", arguments[-1]))
        self.native.submit(*arguments)
        if deferred_ids_ptr is not None:
            self.log[-1] += ("deferred",)
            tokens, top_k, hidden, code, _, id_code, weights, _, output_code, _ = arguments
            rest = weights, deferred_output_ptr, output_code, 0
            self.native.submit(tokens, top_k, hidden, code, deferred_ids_ptr, id_code, *rest)

    def sync_on_stream(self, stream, allowed_pending):
        assert stream == _STREAM
        self.log.append(("sync", allowed_pending))
        try:
            self.engine.sync(allowed_pending)
        except ValueError as error:
            self.error = error

    error = None

    def raise_pending_error(self):
        if self.error is not None:
            error, self.error = self.error, None
            raise error


def _layers(max_deferred, buffers=None, runtime=None):
    buffers, runtime = buffers or BufferCache(), runtime or Runtime()
    made = []
    for index, experts in enumerate(_EXPERTS):
        wrapper = loaded_wrapper(
            experts,
            layer_idx=index,
            weight_path=f"device-{id(buffers)}",
            max_deferred_experts_per_token=max_deferred,
        )
        stream = Stream(wrapper)
        path = DevicePath(
            wrapper._config, stream, wrapper._chain, stream, wrapper.gpu_experts_mask, buffers, runtime
        )
        made.append((wrapper, path, stream))
    return made


@pytest.mark.parametrize("max_deferred", [0, 2])
def test_passes_of_changing_batch_sizes_are_right(max_deferred):
    layers = _layers(max_deferred)
    for seed, tokens in enumerate([1, 5, 64, 3, 1, 8]):
        waiting = torch.zeros(())
        for number, (_, path, _) in enumerate(layers):
            hidden, ids, weights = random_call(100 * seed + number, tokens)
            now, later = slow_rule(ids, weights, TOP_K - max_deferred)
            if number == len(layers) - 1:
                now, later = ids, torch.full_like(ids, -1)
            expected = reference(_EXPERTS[number], hidden, now, weights) + waiting
            waiting = reference(_EXPERTS[number], hidden, later, weights)
            output = path.forward(hidden, ids.int(), weights.bfloat16().float() * 0 + weights, None, Split())
            assert output.shape == (tokens, HIDDEN)
            assert_close(output, expected)


def test_hidden_states_that_are_too_large_to_pack_arrive_all_the_same(monkeypatch):
    monkeypatch.setattr(block, "_MOST_PACKED_BYTES", 4 * HIDDEN * 2)
    _, path, _ = _layers(0)[0]
    for seed, tokens in enumerate([4, 5, 64, 1]):
        call = random_call(seed, tokens)
        assert_close(path.forward(*call, None, Split()), reference(_EXPERTS[0], *call))


def test_deferred_task_follows_the_immediate_one_and_only_it_may_be_pending():
    layers = _layers(1)
    for number, (_, path, _) in enumerate(layers):
        path.forward(*random_call(number, 2), _STREAM, Split())
    assert layers[0][2].log == [("submit", 0, "deferred"), ("sync", 1)]
    assert layers[1][2].log == [("submit", 1, "deferred"), ("sync", 1)]
    assert layers[2][2].log == [("submit", 1), ("sync", 0)]


def test_returned_tensor_is_not_overwritten_by_later_calls():
    _, path, _ = _layers(0)[0]
    first_call = random_call(1, 4)
    first = path.forward(*first_call, None, Split())
    kept = first.clone()
    for seed in range(2, 6):
        path.forward(*random_call(seed, 4), None, Split())
    assert torch.equal(first, kept)


def test_zero_tokens():
    _, path, _ = _layers(0)[0]
    assert path.forward(*random_call(1, 0), None, Split()).shape == (0, HIDDEN)


def test_error_on_the_cpu_is_raised_by_the_call_and_the_next_one_works():
    _, path, _ = _layers(0)[0]
    hidden, ids, weights = random_call(1, 4)
    ids[1, 1] = EXPERTS
    with pytest.raises(InputError, match=r"layer 0 or one before it: .*8"):
        path.forward(hidden, ids, weights, None, Split())
    call = random_call(2, 4)
    assert_close(path.forward(*call, None, Split()), reference(_EXPERTS[0], *call))


def test_sync_without_submit():
    _, path, _ = _layers(0)[0]
    with pytest.raises(CallOrderError, match="without a submit_forward"):
        path.sync(random_call(1, 4)[0], None)


def _allocate(shape, dtype):
    return torch.empty(shape, dtype=dtype)


_KEY = BufferKey(torch.device("cpu"), torch.bfloat16, 16, 2, 1)


@pytest.mark.parametrize(
    "change",
    [
        {"device": torch.device("meta")},
        {"dtype": torch.float16},
        {"hidden_size": 32},
        {"top_k": 3},
        {"stream": 2},
    ],
)
def test_buffers_are_shared_only_between_calls_that_agree_in_everything(change):
    cache = BufferCache()
    assert cache.ring(_KEY, 3, _allocate) is cache.ring(_KEY, 4, _allocate)
    assert cache.ring(_KEY._replace(**change), 4, _allocate) is not cache.ring(_KEY, 4, _allocate)


def test_growing_never_frees_what_a_callback_may_still_use():
    cache = BufferCache()
    small = cache.ring(_KEY, 4, _allocate)
    large = cache.ring(_KEY, 100, _allocate)
    assert large is not small and large.capacity == 128
    assert cache.ring(_KEY, 4, _allocate) is small and cache.ring(_KEY, 5, _allocate) is large


def test_captured_sizes_have_rings_of_their_own():
    cache = BufferCache()
    eager = cache.ring(_KEY, 8, _allocate)
    cache.set_capture_sizes([4, 8])
    captured = cache.ring(_KEY, 8, _allocate)
    assert captured is not eager and captured.capacity == 8
    assert captured is cache.ring(_KEY, 8, _allocate) and captured is not cache.ring(_KEY, 4, _allocate)
    assert cache.ring(_KEY, 7, _allocate) is eager
    cache.clear()
    assert cache.ring(_KEY, 8, _allocate) is not captured


def test_neighbouring_layers_use_different_slots():
    ring = BufferCache().ring(_KEY, 4, _allocate)
    first, second, third = ring.next_slot(), ring.next_slot(), ring.next_slot()
    assert first is not second and third is first
    addresses = {
        tensor.data_ptr()
        for slot in (first, second)
        for tensor in (slot.block, slot.output, slot.deferred_output)
    }
    assert len(addresses) == 6


def test_capture_sizes_must_be_token_counts():
    with pytest.raises(ConfigurationError, match="-2"):
        BufferCache().set_capture_sizes([1, -2])
