"""Risk: queued work runs out of order, its errors vanish or repeat, threads disturb each other."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import threading
import time

import numpy as np
import pytest
from harness import (
    F32,
    Call,
    arguments,
    build_layer,
    ext,
    poisoned,
    random_call,
    random_experts,
    run,
    same_bits,
)
from isolation import isolated

PATIENCE = 30  # seconds until a wait counts as a hang; never reached by a working queue


def wide_layer(engine, seed: int = 1):
    """A layer and a call that take milliseconds, so that tasks pile up behind each other."""
    experts = random_experts(seed, 2, 1024, 1024)
    return build_layer(engine, experts), random_call(seed, experts, 128, top_k=2)


def small_layer(engine, seed: int = 1, hidden: int = 72):
    experts = random_experts(seed, 4, hidden, 40)
    return build_layer(engine, experts), random_call(seed, experts, 33, top_k=2)


def with_bad_id(call: Call) -> Call:
    bad = call.rows(slice(call.tokens))
    bad.ids[-1, -1] = 99
    return bad


def wait_until_idle(engine) -> None:
    deadline = time.monotonic() + PATIENCE
    while engine.pending:
        assert time.monotonic() < deadline, "the queue does not get empty"
        time.sleep(0.001)


# ---- order --------------------------------------------------------------------------------------


def test_queued_tasks_run_in_order():
    """Each task reads what the one before it wrote."""
    engine = ext.Engine(2)
    layer, call = wide_layer(engine)
    steps = [call.hidden] + [poisoned(call.hidden.shape, F32) for _ in range(8)]
    calls = [Call(step, call.ids, call.weights, F32) for step in steps]
    calls[0] = call
    for before, output in zip(calls, steps[1:], strict=False):
        layer.submit(*arguments(before, output, F32))
    engine.sync()
    expected = call
    for step in steps[1:]:
        expected = Call(run(layer, expected), call.ids, call.weights, F32)
        assert same_bits(step, expected.hidden)


def test_forward_runs_after_what_was_queued_before():
    engine = ext.Engine(2)
    layer, call = wide_layer(engine)
    middle, output = poisoned(call.hidden.shape, F32), poisoned(call.hidden.shape, F32)
    layer.submit(*arguments(call, middle, F32))
    second = Call(middle, call.ids, call.weights, F32)
    layer.forward(*arguments(second, output, F32))
    assert same_bits(output, run(layer, Call(run(layer, call), call.ids, call.weights, F32)))


def test_sync_waits_until_no_more_than_the_allowed_tasks_are_left():
    engine = ext.Engine(2)
    layer, call = wide_layer(engine)
    outputs = [poisoned(call.hidden.shape, F32) for _ in range(6)]
    for output in outputs:
        layer.submit(*arguments(call, output, F32))
    for allowed in (4, 1, 0):
        engine.sync(allowed)
        assert engine.pending <= allowed
        assert all(np.isfinite(output).all() for output in outputs[: 6 - allowed])
    engine.sync()
    engine.sync(100)


def test_python_threads_run_while_one_waits():
    engine = ext.Engine(1)
    layer, call = wide_layer(engine)
    output = poisoned(call.hidden.shape, F32)
    for _ in range(60):
        layer.submit(*arguments(call, output, F32))
    waiter = threading.Thread(target=engine.sync)
    waiter.start()
    seen = set()
    while waiter.is_alive():
        seen.add(engine.pending)
    waiter.join()
    assert len(seen) >= 10, (
        f"while a thread waited for 60 tasks, this one saw the lengths {sorted(seen)} only"
    )


# ---- errors -------------------------------------------------------------------------------------


def test_error_of_a_queued_task_surfaces_once_and_the_queue_goes_on():
    engine = ext.Engine(2)
    layer, call = small_layer(engine)
    before, bad, after = (poisoned(call.hidden.shape, F32) for _ in range(3))
    wrong = with_bad_id(call)
    layer.submit(*arguments(call, before, F32))
    layer.submit(*arguments(wrong, bad, F32))
    layer.submit(*arguments(call, after, F32))
    with pytest.raises(ValueError, match=r"id 99 of token 32 is out of range"):
        engine.sync()
    engine.sync()
    expected = run(layer, call)
    assert same_bits(before, expected)
    assert same_bits(after, expected)
    assert np.isnan(bad).all()


def test_only_the_first_of_several_errors_is_kept():
    engine = ext.Engine(2)
    layer, call = small_layer(engine)
    output = poisoned(call.hidden.shape, F32)
    wrong = [with_bad_id(call), with_bad_id(call)]
    wrong[1].ids[-1, -1] = -7
    for each in wrong:
        layer.submit(*arguments(each, output, F32))
    with pytest.raises(ValueError, match="id 99"):
        engine.sync()
    engine.sync()


def test_pending_error_can_be_asked_for_without_waiting():
    engine = ext.Engine(2)
    layer, call = small_layer(engine)
    output = poisoned(call.hidden.shape, F32)
    engine.raise_pending_error()
    wrong = with_bad_id(call)
    layer.submit(*arguments(wrong, output, F32))
    wait_until_idle(engine)
    with pytest.raises(ValueError, match="id 99"):
        engine.raise_pending_error()
    engine.raise_pending_error()
    engine.sync()


def test_error_of_a_queued_task_is_not_swallowed_by_forward():
    engine = ext.Engine(2)
    layer, call = small_layer(engine)
    output = poisoned(call.hidden.shape, F32)
    wrong = with_bad_id(call)
    layer.submit(*arguments(wrong, output, F32))
    run(layer, call)
    with pytest.raises(ValueError, match="id 99"):
        engine.sync()


def test_errors_stay_with_their_engine():
    engine, other = ext.Engine(1), ext.Engine(1)
    layer, call = small_layer(engine)
    output = poisoned(call.hidden.shape, F32)
    wrong = with_bad_id(call)
    layer.submit(*arguments(wrong, output, F32))
    wait_until_idle(engine)
    other.sync()
    with pytest.raises(ValueError, match="id 99"):
        engine.sync()


# ---- several threads, many calls ----------------------------------------------------------------


def in_threads(work, count: int) -> None:
    """Runs work(0) .. work(count-1) at once; fails with the first exception or when one does not end."""
    failures: list[BaseException] = []

    def guarded(index: int) -> None:
        try:
            work(index)
        except BaseException as failure:  # reported below, in the main thread
            failures.append(failure)

    threads = [threading.Thread(target=guarded, args=(i,), daemon=True) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive(), "a thread hangs"
    if failures:
        raise failures[0]


def test_two_layers_on_one_engine_from_several_threads():
    engine = ext.Engine(2)
    made = [small_layer(engine, seed=1, hidden=72), small_layer(engine, seed=2, hidden=200)]
    sizes = (1, 2, 7, 33)
    expected = [[run(layer, call.rows(slice(n))) for n in sizes] for layer, call in made]

    def work(index: int) -> None:
        layer, call = made[index % 2]
        for i in range(150):
            size = (i + index) % len(sizes)
            part = call.rows(slice(sizes[size]))
            if (i // 3 + index) % 2:
                output = run(layer, part)
            else:
                output = poisoned(part.hidden.shape, F32)
                layer.submit(*arguments(part, output, F32))
                engine.sync()
            assert same_bits(output, expected[index % 2][size])

    in_threads(work, 4)


def test_two_engines_at_once():
    made = [small_layer(ext.Engine(2), seed=s) for s in (1, 2)]
    expected = [run(*each) for each in made]

    def work(index: int) -> None:
        for _ in range(100):
            assert same_bits(run(*made[index]), expected[index])

    in_threads(work, 2)


def test_thousands_of_quick_calls():
    engine = ext.Engine(2)
    layer, call = small_layer(engine)
    one = call.rows([0])
    expected = run(layer, one)
    output = poisoned(one.hidden.shape, F32)
    into = arguments(one, output, F32)
    for _ in range(4000):
        layer.forward(*into)
    assert same_bits(output, expected)
    output[:] = np.nan
    for i in range(4000):
        layer.submit(*into)
        if i % 40 == 0:
            engine.sync(3)
    engine.sync()
    assert engine.pending == 0
    assert same_bits(output, expected)


# ---- lifetimes ----------------------------------------------------------------------------------


def drop_everything_while_tasks_are_queued() -> None:
    layer, call = wide_layer(ext.Engine(2))
    output = poisoned(call.hidden.shape, F32)
    last = poisoned(call.hidden.shape, F32)
    expected = run(layer, call)
    for _ in range(20):
        layer.submit(*arguments(call, output, F32))
    layer.submit(*arguments(call, last, F32))
    del layer
    gc.collect()
    deadline = time.monotonic() + PATIENCE
    while not same_bits(last, expected):
        assert time.monotonic() < deadline, "tasks were dropped with their layer"
        time.sleep(0.01)
    time.sleep(0.2)  # for the threads to end


def drop_the_engine_before_the_layer() -> None:
    engine = ext.Engine(2)
    layer, call = small_layer(engine)
    expected = run(layer, call)
    del engine
    gc.collect()
    assert same_bits(run(layer, call), expected)


def drop_the_layer_and_keep_the_engine() -> None:
    engine = ext.Engine(2)
    layer, call = wide_layer(engine)
    expected = run(layer, call)
    output = poisoned(call.hidden.shape, F32)
    for _ in range(5):
        layer.submit(*arguments(call, output, F32))
    del layer
    gc.collect()
    engine.sync()
    assert same_bits(output, expected)


def leak(*objects) -> None:
    for each in objects:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(each))


def leave_with_tasks_queued() -> None:
    """The interpreter ends while tasks run; their buffers are never freed."""
    layer, call = wide_layer(ext.Engine(2))
    output = poisoned(call.hidden.shape, F32)
    leak(call.hidden, call.ids, call.weights, output)
    for _ in range(20):
        layer.submit(*arguments(call, output, F32))
    sys.exit(0)


def leave_with_everything_leaked() -> None:
    """The same with a layer and an engine that are never destroyed."""
    layer, call = wide_layer(ext.Engine(2))
    output = poisoned(call.hidden.shape, F32)
    leak(layer, call.hidden, call.ids, call.weights, output)
    for _ in range(20):
        layer.submit(*arguments(call, output, F32))
    sys.exit(0)


@pytest.mark.parametrize(
    "scene",
    [
        drop_everything_while_tasks_are_queued,
        drop_the_engine_before_the_layer,
        drop_the_layer_and_keep_the_engine,
        leave_with_tasks_queued,
        leave_with_everything_leaked,
    ],
)
def test_lifetimes_end_in_any_order(scene):
    isolated("test_queue", scene.__name__, timeout=2 * PATIENCE)


def test_engines_come_and_go_without_leaving_threads():
    before = len(os.listdir("/proc/self/task"))
    for _ in range(50):
        engine = ext.Engine(3)
        layer, call = small_layer(engine)
        output = poisoned(call.hidden.shape, F32)
        layer.submit(*arguments(call, output, F32))
        engine.sync()
        del layer, engine
        gc.collect()
    assert len(os.listdir("/proc/self/task")) <= before
