"""Risk: an argument that cannot be right crashes the process, hangs it, or is silently taken for another.

Each gives one sentence with the value seen, leaves outputs untouched, and the engine works afterwards.
"""

from __future__ import annotations

import numpy as np
import pytest
from formats import BF16, CODES, F32, INTEGER_CODES, METHODS
from harness import (
    arguments,
    build_layer,
    ext,
    make_layer,
    poisoned,
    random_call,
    random_experts,
    reference,
    run,
)
from isolation import isolated, python

ENGINE = ext.Engine(2)
EXPERTS = random_experts(1, 4, 72, 40)


@pytest.fixture(scope="module")
def layer():
    return build_layer(ENGINE, EXPERTS, max_tokens=64)


@pytest.fixture
def call():
    return random_call(1, EXPERTS, 9, top_k=2)


# ---- engines ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments_", "message"),
    [
        ({"threads": 0}, "threads is 0"),
        ({"threads": -3}, "threads is -3"),
        ({"threads": 2, "subpools": 0}, "thread pools is 0"),
        ({"threads": 2, "subpools": 3}, r"thread pools is 3.*\(2\)"),
        ({"threads": 2, "subpools": 2, "numa_nodes": [0]}, "names 1 nodes for 2"),
        ({"threads": 1, "numa_nodes": [4321]}, "node 4321.*usable nodes are"),
        ({"threads": 1, "numa_nodes": [-1]}, "node -1"),
    ],
)
def test_impossible_engine(arguments_, message):
    with pytest.raises(ValueError, match=message):
        ext.Engine(**arguments_)


def test_more_threads_than_cores_and_more_pools_than_nodes_are_warned_about():
    nodes = len(ext.topology()["numa_nodes"])
    cores = ext.topology()["physical_cores"]
    assert not ext.Engine(1).warnings
    assert any("more threads than cores" in warning for warning in ext.Engine(cores + 1).warnings)
    assert any("NUMA node" in warning for warning in ext.Engine(nodes + 1, nodes + 1).warnings)


# ---- layers (their weights: test_bad_weights.py) ------------------------------------------------


@pytest.mark.parametrize("name", ["num_experts", "top_k", "hidden", "intermediate", "max_tokens"])
@pytest.mark.parametrize("value", [0, -5])
def test_impossible_layer_size(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        make_layer(ENGINE, EXPERTS, **{name: value})


def test_unknown_method_names_the_known_ones():
    with pytest.raises(ValueError, match=r"'FP3'.*BF16"):
        make_layer(ENGINE, EXPERTS, method="FP3")


def test_unknown_activations_name_the_known_ones():
    with pytest.raises(ValueError, match=r"'fp4'.*auto, bf16 or int8"):
        make_layer(ENGINE, EXPERTS, activations="fp4")


@pytest.mark.parametrize("method", [method for method in METHODS if CODES[method] not in INTEGER_CODES])
def test_activations_that_a_method_does_not_have(method):
    with pytest.raises(ValueError, match=rf"{method} .*int8 activations.*bf16"):
        make_layer(ENGINE, EXPERTS, method=method, activations="int8")


@pytest.mark.parametrize("value", [-1.0, float("nan")])
@pytest.mark.parametrize("name", ["swiglu_limit", "swiglu_alpha"])
def test_swiglu_constant_that_is_not_a_positive_number(name, value):
    with pytest.raises(ValueError, match=name):
        make_layer(ENGINE, EXPERTS, **{name: value})


# ---- calls --------------------------------------------------------------------------------------


def test_forward_before_load(call):
    layer = make_layer(ENGINE, EXPERTS, layer_idx=17)
    output = poisoned(call.hidden.shape, F32)
    for method in (layer.forward, layer.submit):
        with pytest.raises(RuntimeError, match="layer 17 has no weights"):
            method(*arguments(call, output, F32))
    assert np.isnan(output).all()


@pytest.mark.parametrize("method", ["forward", "submit"])
@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, -1, "got -1 tokens"),
        (0, 65, "got 65 tokens.*at most 64"),
        (1, 0, "got 0 experts per token"),
        (1, -2, "got -2 experts per token"),
        (1, 5, "got 5 experts per token; expected 1 to 4"),
        (3, 3, "hidden dtype code 3"),
        (3, -1, "hidden dtype code -1"),
        (5, 2, "ids dtype code 2"),
        (8, 7, "output dtype code 7"),
    ],
)
def test_impossible_call_is_refused_at_once(layer, call, method, position, value, message):
    output = poisoned(call.hidden.shape, F32)
    into = list(arguments(call, output, F32))
    into[position] = value
    with pytest.raises(ValueError, match=message):
        getattr(layer, method)(*into)
    assert np.isnan(output).all()
    ENGINE.sync()


@pytest.mark.parametrize("ids_dtype", [np.int32, np.int64])
@pytest.mark.parametrize("bad", [-2, 4, 2**31 - 1, -(2**31), 2**32, 2**63 - 1, -(2**63)])
def test_expert_id_out_of_range_leaves_the_output_untouched(layer, call, bad, ids_dtype):
    if not np.iinfo(ids_dtype).min <= bad <= np.iinfo(ids_dtype).max:
        bad %= 100  # the number does not exist in this dtype; any other bad one will do
        bad += 4
    call.ids = call.ids.astype(ids_dtype)
    call.ids[7, 1] = bad
    output = poisoned(call.hidden.shape, F32)
    with pytest.raises(ValueError, match=rf"id {bad} of token 7 is out of range; ids go from 0 to 3"):
        layer.forward(*arguments(call, output, F32))
    assert np.isnan(output).all()
    call.ids[7, 1] = 0
    assert np.isfinite(run(layer, call)).all()


def test_ids_out_of_range_are_found_in_skipped_company(layer, call):
    mask = np.ones(4, np.uint8)
    masked = build_layer(ENGINE, EXPERTS)
    masked.set_expert_mask(mask.ctypes.data)
    call.ids[3, 0] = 4
    with pytest.raises(ValueError, match="id 4 of token 3"):
        run(masked, call)


def test_no_tokens_is_no_error(layer, call):
    layer.forward(0, 2, 0, BF16, 0, 0, 0, 0, F32, 0)
    layer.submit(0, 2, 0, BF16, 0, 0, 0, 0, F32, 0)
    ENGINE.sync()


def test_the_layer_works_after_all_that(layer, call):
    error = np.abs(run(layer, call) - reference(EXPERTS, call)).max()
    assert error < 0.05


def wait_for_fewer_than_no_tasks() -> None:
    with pytest.raises(ValueError, match="-1"):
        ext.Engine(1).sync(-1)


def test_waiting_for_a_negative_number_of_tasks_does_not_hang():
    isolated("test_bad_arguments", "wait_for_fewer_than_no_tasks")


# ---- the environment ----------------------------------------------------------------------------

PRINT_ERROR = """
from extension import ext
for attempt in range(2):
    try:
        ext.cpu_features()
    except ValueError as error:
        print(error)
try:
    ext.MoeLayer(ext.Engine(1), method="BF16", num_experts=1, top_k=1, hidden=1, intermediate=1, max_tokens=1)
except ValueError as error:
    print(error)
"""


def test_unknown_cpu_variant_is_an_error_on_every_use():
    done = python("-c", PRINT_ERROR, KT_KERNEL_CPU_VARIANT="avx1024")
    assert done.returncode == 0, done.stdout
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    for line in lines:
        assert "KT_KERNEL_CPU_VARIANT is 'avx1024'; known values are avx2, avx_vnni, avx512" in line


def test_empty_cpu_variant_is_no_cap():
    done = python("-c", "from harness import ext; print(ext.cpu_features()['cap'])", KT_KERNEL_CPU_VARIANT="")
    assert done.stdout.split() == ["None"], done.stdout
