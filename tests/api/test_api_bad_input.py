"""Bad input gives one clear sentence, and the layer goes on working afterwards."""

import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from api_support import (
    EXPERTS,
    HIDDEN,
    INTERMEDIATE,
    MAX_TOKENS,
    TOP_K,
    assert_close,
    loaded_wrapper,
    make_wrapper,
    random_call,
    random_experts,
    reference,
)

from kt_kernel import kt_kernel_ext
from kt_kernel.errors import CallOrderError, ConfigurationError, InputError, KTError, MethodError
from kt_kernel.formats.methods import METHODS, available_methods

_EXPERTS = random_experts(seed=3)


@pytest.fixture(scope="module")
def layer():
    return loaded_wrapper(_EXPERTS)


@pytest.fixture
def wrapper(layer):
    """A loaded layer that must still give the right result after the test."""
    yield layer
    call = random_call(0, 5)
    assert_close(layer.forward(*call), reference(_EXPERTS, *call))
    assert layer.cpu_infer.pending == 0


def _call_both_ways(wrapper, *call):
    yield lambda: wrapper.forward(*call)

    def submit_and_sync():
        wrapper.submit_forward(*call)
        wrapper.sync_forward(call[0])

    yield submit_and_sync


def _assert_refused(wrapper, call, *fragments, error=InputError):
    for attempt in _call_both_ways(wrapper, *call):
        with pytest.raises(error) as caught:
            attempt()
        message = str(caught.value)
        assert isinstance(caught.value, ValueError) and "\n" not in message
        for fragment in ("layer 0", *fragments):
            assert fragment in message, message


def test_wrong_hidden_width(wrapper):
    hidden, ids, weights = random_call(1, 4)
    _assert_refused(wrapper, (hidden[:, :-8].contiguous(), ids, weights), f"{HIDDEN - 8} wide", f"{HIDDEN}")


def test_wrong_top_k_width(wrapper):
    hidden, ids, weights = random_call(2, 4)
    _assert_refused(wrapper, (hidden, ids[:, :2], weights[:, :2]), "topk_ids", "[4, 2]", f"[4, {TOP_K}]")
    _assert_refused(wrapper, (hidden, ids, weights[:, :2]), "topk_weights", "[4, 2]")


@pytest.mark.parametrize("bad_id", [EXPERTS, 10_000, -2, 2**40])
def test_ids_out_of_range(wrapper, bad_id):
    hidden, ids, weights = random_call(3, 4)
    ids[2, 1] = bad_id
    _assert_refused(wrapper, (hidden, ids, weights), str(bad_id), str(EXPERTS - 1))


@pytest.mark.parametrize("rows", [0, 3, 5])
def test_ids_with_another_number_of_rows_than_tokens(wrapper, rows):
    hidden, _, weights = random_call(4, 4)
    _, ids, _ = random_call(4, rows)
    _assert_refused(wrapper, (hidden, ids, weights), f"[{rows}, {TOP_K}]", f"[4, {TOP_K}]")


def test_more_tokens_than_chunked_prefill_size(wrapper):
    call = random_call(5, MAX_TOKENS + 1)
    _assert_refused(wrapper, call, f"{MAX_TOKENS + 1} tokens", f"chunked_prefill_size ({MAX_TOKENS})")


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8])
def test_hidden_of_a_dtype_without_kernels(wrapper, dtype):
    hidden, ids, weights = random_call(6, 2)
    _assert_refused(wrapper, (hidden.to(dtype), ids, weights), str(dtype), "bfloat16")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_ids_that_are_no_integers(wrapper, dtype):
    hidden, ids, weights = random_call(7, 2)
    _assert_refused(wrapper, (hidden, ids.to(dtype), weights), "topk_ids", str(dtype))


def test_tensors_on_another_device(wrapper):
    hidden, ids, weights = random_call(8, 2)
    _assert_refused(wrapper, (hidden, ids.to("meta"), weights), "topk_ids", "meta", "cpu")
    _assert_refused(wrapper, (hidden.to("meta"), ids, weights), "meta", "cpu or cuda")


def test_forward_before_load():
    wrapper = make_wrapper(layer_idx=5)
    call = random_call(9, 2)
    for attempt in (
        lambda: wrapper.forward(*call),
        lambda: wrapper.submit_forward(*call),
        lambda: wrapper.sync_forward(call[0]),
    ):
        with pytest.raises(CallOrderError, match=r"layer 5: the weights are not loaded; call load_weights"):
            attempt()


def test_sync_without_submit(wrapper):
    with pytest.raises(CallOrderError, match="without a submit_forward"):
        wrapper.sync_forward(random_call(10, 2)[0])


def test_sync_for_another_batch(wrapper):
    call = random_call(11, 4)
    wrapper.submit_forward(*call)
    with pytest.raises(CallOrderError, match="pass the same hidden_states"):
        wrapper.sync_forward(call[0][:2])


def test_a_submitted_call_that_nobody_fetched_does_not_disturb_the_next(wrapper):
    abandoned = random_call(12, 64)
    wrapper.submit_forward(*abandoned)
    del abandoned
    call = random_call(13, 4)
    wrapper.submit_forward(*call)
    assert_close(wrapper.sync_forward(call[0]), reference(_EXPERTS, *call))


def test_a_layer_may_go_away_while_its_call_is_queued():
    layers = []
    for seed in range(10):
        wrapper = loaded_wrapper(_EXPERTS)
        wrapper.submit_forward(*random_call(seed, 64))
        layers.append(weakref.ref(wrapper))
        del wrapper
    gc.collect()
    assert not any(layer() for layer in layers)
    call = random_call(0, 5)
    assert_close(loaded_wrapper(_EXPERTS).forward(*call), reference(_EXPERTS, *call))


@pytest.mark.parametrize(
    ("change", "fragments"),
    [
        ({"cpuinfer_threads": 0}, ["cpuinfer_threads is 0", "at least 1"]),
        ({"cpuinfer_threads": -1}, ["cpuinfer_threads is -1"]),
        ({"threadpool_count": 0}, ["threadpool_count is 0"]),
        ({"threadpool_count": 3}, ["threadpool_count is 3", "cpuinfer_threads (2)"]),
        ({"numa_nodes": [0, 0]}, ["numa_nodes names 2 nodes", "threadpool_count is 1"]),
        ({"numa_nodes": [4711]}, ["4711"]),
        ({"numa_nodes": [4711], "cpuinfer_threads": None}, ["numa_nodes names node 4711"]),
        (
            {"threadpool_count": 1000, "cpuinfer_threads": None, "numa_nodes": [0]},
            ["threadpool_count is 1000"],
        ),
        ({"num_experts": 0}, ["num_experts is 0"]),
        ({"num_experts": 2.5}, ["num_experts is 2.5", "integer"]),
        ({"num_experts_per_tok": EXPERTS + 1}, [f"num_experts_per_tok is {EXPERTS + 1}", str(EXPERTS)]),
        ({"hidden_size": 0}, ["hidden_size is 0"]),
        ({"moe_intermediate_size": -4}, ["moe_intermediate_size is -4"]),
        ({"chunked_prefill_size": -1}, ["chunked_prefill_size is -1"]),
        ({"max_deferred_experts_per_token": TOP_K + 1}, ["max_deferred_experts_per_token is 4", "3 experts"]),
        ({"max_deferred_experts_per_token": -1}, ["max_deferred_experts_per_token is -1"]),
        ({"swiglu_limit": -1.0}, ["swiglu_limit is -1.0"]),
        ({"swiglu_alpha": float("nan")}, ["swiglu_alpha is nan"]),
        ({"mode": "train"}, ["mode is 'train'", "inference"]),
        ({"lora_rank": 8}, ["lora_rank=8", "training"]),
        ({"cpu_save": True}, ["cpu_save", "BF16"]),
    ],
)
def test_impossible_constructor_values(change, fragments):
    with pytest.raises(KTError) as caught:
        make_wrapper(**change)
    for fragment in fragments:
        assert fragment in str(caught.value), str(caught.value)


def test_unknown_method_names_what_exists():
    with pytest.raises(MethodError, match=r"method 'AMXINT5' is unknown.*AMXINT4.*this build has BF16"):
        make_wrapper(method="AMXINT5")
    with pytest.raises(MethodError, match="case-sensitive"):
        make_wrapper(method="bf16")


def test_method_without_kernels_names_what_is_available(monkeypatch):
    assert len(METHODS) == 13 and set(METHODS) == set(available_methods())
    monkeypatch.setattr(kt_kernel_ext, "METHODS", ("BF16", "FP8"))
    with pytest.raises(
        MethodError, match="method 'LLAMAFILE' is not available in this build, which has BF16, FP8;"
    ):
        make_wrapper(method="LLAMAFILE")


def test_unknown_cpu_variant_is_one_clear_error_and_the_process_goes_on():
    program = (
        "import kt_kernel, api_support\n"
        "for attempt in (lambda: kt_kernel.__cpu_variant__, api_support.make_wrapper) * 2:\n"
        "    try:\n"
        "        attempt()\n"
        "    except ValueError as error:\n"
        "        print('refused', error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parent,
        env={**os.environ, "KT_KERNEL_CPU_VARIANT": "avx1024"},
        capture_output=True,
        text=True,
        timeout=480,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 4 and all(
        "refused" in line and "avx1024" in line and "avx2" in line for line in lines
    )


@pytest.mark.parametrize(
    ("bad_map", "fragment"),
    [
        (torch.arange(EXPERTS - 1), f"[{EXPERTS - 1}]"),
        (torch.arange(EXPERTS) + 1, f"impossible ones [{EXPERTS}]"),
        (torch.zeros(EXPERTS, dtype=torch.int64), "leaves out experts [1, 2"),
        (torch.arange(EXPERTS).double(), "float64"),
    ],
)
def test_map_that_loses_an_expert(bad_map, fragment):
    wrapper = make_wrapper()
    with pytest.raises(ConfigurationError) as caught:
        wrapper.load_weights_from_tensors(*_EXPERTS, bad_map)
    assert fragment in str(caught.value)


def test_expert_tensors_of_another_shape_or_dtype():
    wrapper = make_wrapper()
    gate, up, down = _EXPERTS
    with pytest.raises(
        InputError, match=rf"down_proj has shape .*expected \[{EXPERTS}, {HIDDEN}, {INTERMEDIATE}\]"
    ):
        wrapper.load_weights_from_tensors(gate, up, down.transpose(1, 2))
    with pytest.raises(InputError, match=r"up_proj is torch.float32 on cpu, expected torch.bfloat16"):
        wrapper.load_weights_from_tensors(gate, up.float(), down)


def test_failed_load_keeps_the_weights_there_were(wrapper):
    gate, up, down = _EXPERTS
    with pytest.raises(InputError):
        wrapper.load_weights_from_tensors(gate[:4], up, down)
