"""Both ways to say where experts live, as different serving software calls the constructor."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from api_support import (
    EXPERTS,
    HIDDEN,
    INTERMEDIATE,
    MAX_TOKENS,
    NMSE_BOUND,
    TOP_K,
    make_wrapper,
    nmse,
    qwen_tensors,
    random_call,
    random_experts,
    reference,
    save_single,
)

import kt_kernel
from kt_kernel import KTMoEWrapper, generate_gpu_experts_masks, moe
from kt_kernel.errors import ConfigurationError
from kt_kernel.threads import plan_threads


def test_a_number_puts_the_first_experts_on_the_accelerator():
    wrapper = make_wrapper(num_gpu_experts=3)
    assert wrapper.gpu_experts_mask.tolist() == [True] * 3 + [False] * (EXPERTS - 3)
    assert wrapper.num_gpu_experts == 3


def test_a_mask_puts_any_experts_on_the_accelerator():
    mask = torch.zeros(EXPERTS, dtype=torch.bool)
    mask[[1, 6]] = True
    wrapper = make_wrapper(gpu_experts_mask=mask)
    assert torch.equal(wrapper.gpu_experts_mask, mask) and wrapper.gpu_experts_mask is not mask
    assert make_wrapper(gpu_experts_mask=mask, num_gpu_experts=2).num_gpu_experts == 2


def test_neither_puts_all_experts_on_the_cpu():
    assert make_wrapper().num_gpu_experts == 0
    assert make_wrapper(gpu_experts_mask=None).num_gpu_experts == 0


def test_contradiction_is_refused():
    mask = torch.ones(EXPERTS, dtype=torch.bool)
    with pytest.raises(
        ConfigurationError, match=f"num_gpu_experts is 2, but gpu_experts_mask puts {EXPERTS}"
    ):
        make_wrapper(gpu_experts_mask=mask, num_gpu_experts=2)


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_gpu_experts": -1},
        {"num_gpu_experts": EXPERTS + 1},
        {"gpu_experts_mask": torch.zeros(EXPERTS + 1, dtype=torch.bool)},
        {"gpu_experts_mask": torch.zeros(EXPERTS, dtype=torch.int64)},
        {"gpu_experts_mask": [False] * EXPERTS},
    ],
)
def test_masks_and_numbers_that_fit_no_layer(arguments):
    with pytest.raises(ConfigurationError, match=str(EXPERTS)):
        make_wrapper(**arguments)


@pytest.mark.parametrize("sixth", [None, 3, torch.tensor([True] * 3 + [False] * (EXPERTS - 3))])
def test_positional_order_is_the_published_one(sixth):
    wrapper = KTMoEWrapper(
        4, EXPERTS, TOP_K, HIDDEN, INTERMEDIATE, sixth, 2, 1, "somewhere", MAX_TOKENS, False, 2, "BF16"
    )
    assert wrapper.num_gpu_experts == (0 if sixth is None else 3)
    assert (wrapper.layer_idx, wrapper.weight_path, wrapper.chunked_prefill_size) == (
        4,
        "somewhere",
        MAX_TOKENS,
    )
    assert (wrapper.max_deferred_experts_per_token, wrapper.method) == (2, "BF16")


def test_layers_sizes_are_enough():
    """The first call that a newcomer writes: everything else has a default that works."""
    experts = random_experts(seed=1)
    wrapper = KTMoEWrapper(0, EXPERTS, TOP_K, HIDDEN, INTERMEDIATE)
    assert (wrapper.method, wrapper.num_gpu_experts, wrapper.weight_path) == ("BF16", 0, None)
    assert wrapper.chunked_prefill_size == moe.DEFAULT_MOST_TOKENS
    plan = plan_threads(kt_kernel.kt_kernel_ext.topology())
    assert wrapper.cpu_infer.threads == plan.threads
    wrapper.load_weights_from_tensors(*experts)
    call = random_call(seed=2, tokens=5)
    assert nmse(wrapper.forward(*call), reference(experts, *call)) <= NMSE_BOUND


def test_weight_path_alone_says_the_method(tmp_path):
    experts = random_experts(seed=3)
    save_single(tmp_path, qwen_tensors(experts))
    wrapper = KTMoEWrapper(0, EXPERTS, TOP_K, HIDDEN, INTERMEDIATE, weight_path=tmp_path)
    assert wrapper.method == "BF16"
    wrapper.load_weights()
    call = random_call(seed=4, tokens=5)
    assert nmse(wrapper.forward(*call), reference(experts, *call)) <= NMSE_BOUND


def test_nones_are_the_defaults():
    wrapper = KTMoEWrapper(0, EXPERTS, TOP_K, HIDDEN, INTERMEDIATE, *[None] * 5, False, None, None, None)
    assert wrapper.method == "BF16" and wrapper.chunked_prefill_size == moe.DEFAULT_MOST_TOKENS


def test_every_argument_and_its_default_are_documented():
    documented = KTMoEWrapper.__doc__
    for name in inspect.signature(KTMoEWrapper.__init__).parameters.keys() - {"self"}:
        assert f"`{name}" in documented, name
    assert documented.count("default") >= 13


def test_example_of_the_documentation_runs():
    """As a program of its own, because that is how it is tried."""
    page = Path(__file__).resolve().parents[2] / "doc/python.md"
    example = re.search(r"```python\n(.*?)```", page.read_text(), re.DOTALL)[1]
    assert len(example.splitlines()) <= 20
    done = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True)
    assert done.stdout == "BF16 torch.Size([5, 256]) torch.bfloat16\n", done.stderr


def test_attributes_other_software_reads():
    wrapper = make_wrapper(max_deferred_experts_per_token=None)
    assert wrapper.num_experts == EXPERTS and wrapper.num_experts_per_tok == TOP_K
    assert wrapper.hidden_size == HIDDEN and wrapper.moe_intermediate_size == INTERMEDIATE
    assert wrapper.max_deferred_experts_per_token == 0
    assert wrapper.cpu_infer.threads == 2 and wrapper.moe is None


def test_training_options_at_their_defaults_are_accepted_and_unknown_ones_are_not():
    make_wrapper(lora_rank=16, lora_alpha=32.0, group_size=128, zero_point=True)
    with pytest.raises(TypeError, match="num_experst"):
        make_wrapper(num_experst=8)


def test_package_surface():
    assert set(kt_kernel.__all__) <= set(dir(kt_kernel))
    assert kt_kernel.__cpu_variant__ == kt_kernel.kt_kernel_ext.cpu_features()["variant"]
    assert kt_kernel.__version__
    with pytest.raises(AttributeError, match="nonsense"):
        _ = kt_kernel.nonsense


def test_capture_batch_sizes_are_process_wide():
    before = KTMoEWrapper.get_capture_batch_sizes()
    KTMoEWrapper.set_capture_batch_sizes([1, 4])
    assert KTMoEWrapper.get_capture_batch_sizes() == [1, 4]
    with pytest.raises(ConfigurationError, match="0"):
        KTMoEWrapper.set_capture_batch_sizes([0])
    KTMoEWrapper.set_capture_batch_sizes(before)
    KTMoEWrapper.clear_buffer_cache()


def test_most_used_experts_of_all_layers_are_chosen():
    frequencies = torch.tensor([[5, 1, 9, 0], [7, 7, 2, 8]])
    mask = generate_gpu_experts_masks(frequencies, 4)
    assert mask.dtype == torch.bool and mask.device.type == "cpu"
    assert mask.tolist() == [[False, False, True, False], [True, True, False, True]]


@pytest.mark.parametrize(("count", "chosen"), [(-3, 0), (0, 0), (8, 8), (100, 8)])
def test_number_of_masked_experts_is_clamped(count, chosen):
    assert int(generate_gpu_experts_masks(torch.rand(2, 4), count).sum()) == chosen


def test_equal_frequencies_choose_the_same_experts_every_time():
    assert generate_gpu_experts_masks(torch.zeros(2, 3), 4).tolist() == [[True] * 3, [True, False, False]]


def test_frequencies_that_are_none_are_refused():
    with pytest.raises(ConfigurationError, match=r"\[4\]"):
        generate_gpu_experts_masks(torch.rand(4), 2)
    with pytest.raises(ConfigurationError, match="NaN"):
        generate_gpu_experts_masks(torch.tensor([[1.0, float("nan")]]), 1)


def test_activations_that_do_not_exist_are_refused():
    for activations in ("auto", "bf16"):
        make_wrapper(activations=activations)
    with pytest.raises(ConfigurationError, match="activations is 'fp4', expected one of auto, bf16, int8"):
        make_wrapper(activations="fp4")
