"""Risk: the engine's figures (calls, seconds, bytes) lie about what was computed."""

from __future__ import annotations

import numpy as np
import pytest
from formats import FORMATS
from harness import F32, arguments, build_layer, ext, poisoned, random_call, random_experts, run


def layer_and_call(engine, format=FORMATS[0]):
    experts = random_experts(1, 4, format.fit(64), format.fit(64), format)
    return build_layer(engine, experts), random_call(1, experts, 6, top_k=2)


def bytes_of(layer, *ids: np.ndarray) -> int:
    distinct = sum(len(np.unique(each[each >= 0])) for each in ids)
    return distinct * layer.weight_bytes // 4


def test_nothing_computed_yet():
    engine = ext.Engine(2)
    layer_and_call(engine)
    assert engine.stats() == {"calls": 0, "seconds": 0.0, "bytes": 0}


def test_each_call_counts_the_distinct_experts_it_read():
    for format in FORMATS:
        engine = ext.Engine(2, 2)
        layer, call = layer_and_call(engine, format)
        few = call.rows([0])
        few.ids[:] = [[3, 3]]
        output = poisoned(call.hidden.shape, F32)
        run(layer, call)
        layer.submit(*arguments(few, output, F32))
        engine.sync()
        stats = engine.stats()
        assert stats["calls"] == 2
        assert stats["bytes"] == bytes_of(layer, call.ids, few.ids)
        assert stats["seconds"] > 0


def test_calls_without_an_expert_of_the_cpu_do_not_count():
    engine = ext.Engine(2)
    layer, call = layer_and_call(engine)
    call.ids[:] = -1
    run(layer, call)
    mask = np.ones(4, np.uint8)
    layer.set_expert_mask(mask.ctypes.data)
    call.ids[:] = 2
    run(layer, call)
    run(layer, call.rows([]))
    assert engine.stats()["calls"] == 0
    mask[2] = 0
    run(layer, call)
    assert engine.stats()["bytes"] == layer.weight_bytes // 4


def test_failed_calls_do_not_count():
    engine = ext.Engine(2)
    layer, call = layer_and_call(engine)
    call.ids[0, 0] = 9
    output = poisoned(call.hidden.shape, F32)
    with pytest.raises(ValueError, match="id 9"):
        layer.forward(*arguments(call, output, F32))
    assert engine.stats()["calls"] == 0


def test_engines_count_for_themselves():
    engine, other = ext.Engine(1), ext.Engine(1)
    run(*layer_and_call(engine))
    assert engine.stats()["calls"] == 1
    assert other.stats()["calls"] == 0


def test_a_layer_counts_the_uses_that_the_cpu_computed_and_no_others():
    layer, call = layer_and_call(ext.Engine(2))
    call.ids[0], call.ids[1, 0] = [-1, 2], -1
    mask = np.array([0, 1, 0, 0], np.uint8)  # expert 1 is on the device
    for _ in range(2):
        run(layer, call)
    counted = np.bincount(call.ids[call.ids >= 0], minlength=4)
    assert layer.expert_uses == (2 * counted).tolist()
    layer.set_expert_mask(mask.ctypes.data)
    run(layer, call)
    assert layer.expert_uses == (3 * counted - mask * counted).tolist()
