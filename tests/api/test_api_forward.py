"""What a forward call may get wrong: numbers, neighbours, dtypes, masks, orders of calls, needless copies."""

import pytest
import torch
from api_support import (
    EXPERTS,
    HIDDEN,
    MAX_TOKENS,
    TOP_K,
    assert_close,
    loaded_wrapper,
    random_call,
    random_experts,
    reference,
)


@pytest.fixture(scope="module")
def experts():
    return random_experts(seed=1)


@pytest.fixture(scope="module")
def wrapper(experts):
    return loaded_wrapper(experts)


@pytest.mark.parametrize("tokens", [1, 2, 5, 17, MAX_TOKENS])
def test_result_is_the_weighted_sum_of_the_experts(wrapper, experts, tokens):
    call = random_call(tokens, tokens)
    assert_close(wrapper.forward(*call), reference(experts, *call))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64, torch.int16, torch.uint8])
def test_every_dtype_gives_the_same_numbers_in_the_dtype_of_hidden(wrapper, experts, dtype, ids_dtype):
    hidden, ids, weights = random_call(2, 4, dtype)
    output = wrapper.forward(hidden, ids.to(ids_dtype), weights)
    assert output.dtype == dtype and output.shape == (4, HIDDEN)
    assert_close(output, reference(experts, hidden, ids, weights))


def test_weights_of_half_precision_are_used_as_they_are(wrapper, experts):
    hidden, ids, weights = random_call(3, 4)
    weights = weights.bfloat16()
    assert_close(wrapper.forward(hidden, ids, weights), reference(experts, hidden, ids, weights))


def test_submit_and_sync_give_exactly_what_forward_gives(wrapper):
    call = random_call(4, 9)
    wrapper.submit_forward(*call)
    assert torch.equal(wrapper.sync_forward(call[0]), wrapper.forward(*call))


def test_cuda_stream_is_ignored_for_cpu_tensors(wrapper):
    call = random_call(5, 2)
    expected = wrapper.forward(*call)
    assert torch.equal(wrapper.forward(*call, 12345), expected)
    wrapper.submit_forward(*call, 12345)
    assert torch.equal(wrapper.sync_forward(call[0], 12345), expected)


def test_ids_masked_in_place_after_submit_do_not_change_the_result(wrapper):
    hidden, ids, weights = random_call(6, 32)
    expected = wrapper.forward(hidden, ids, weights)
    for _ in range(20):
        submitted = ids.clone()
        wrapper.submit_forward(hidden, submitted, weights)
        submitted.fill_(-1)
        assert torch.equal(wrapper.sync_forward(hidden), expected)


def test_forward_touches_the_callers_memory_and_one_output_only(wrapper, monkeypatch):
    """Fast path: the kernels get the addresses of the caller's tensors, and torch allocates once."""
    hidden, ids, weights = random_call(7, 3)
    seen = []

    class Recorder:
        def forward(self, *arguments):
            seen.append(arguments)

    monkeypatch.setattr(wrapper._cpu, "_native", Recorder())
    output = wrapper.forward(hidden, ids, weights)
    addresses = hidden.data_ptr(), ids.data_ptr(), weights.data_ptr(), output.data_ptr()
    assert seen == [(3, TOP_K, addresses[0], 0, addresses[1], 1, addresses[2], addresses[3], 0, 0)]


def test_inputs_are_left_unchanged(wrapper):
    call = random_call(8, 5)
    copies = [tensor.clone() for tensor in call]
    wrapper.forward(*call)
    wrapper.submit_forward(*call)
    wrapper.sync_forward(call[0])
    for tensor, copy in zip(call, copies, strict=True):
        assert torch.equal(tensor, copy)


def test_strided_inputs_are_read_by_their_strides(wrapper):
    hidden, ids, weights = random_call(9, 6)
    expected = wrapper.forward(hidden, ids, weights)
    wide = torch.zeros(6, 2 * HIDDEN, dtype=hidden.dtype)
    wide[:, ::2] = hidden
    actual = wrapper.forward(wide[:, ::2], ids.t().contiguous().t(), weights.t().contiguous().t())
    assert torch.equal(actual, expected) and actual.is_contiguous()


def test_leading_dimensions_of_hidden_are_tokens(wrapper):
    hidden, ids, weights = random_call(10, 6)
    assert torch.equal(
        wrapper.forward(hidden.view(2, 3, HIDDEN), ids, weights), wrapper.forward(hidden, ids, weights)
    )


def test_token_result_does_not_depend_on_neighbours(wrapper):
    hidden, ids, weights = random_call(11, 8)
    together = wrapper.forward(hidden, ids, weights)
    for token in range(8):
        row = slice(token, token + 1)
        assert torch.equal(wrapper.forward(hidden[row], ids[row], weights[row])[0], together[token])


def test_nan_stays_in_its_own_token(wrapper):
    hidden, ids, weights = random_call(12, 5)
    expected = wrapper.forward(hidden, ids, weights)
    hidden[2, 7] = float("nan")
    output = wrapper.forward(hidden, ids, weights)
    assert output[2].isnan().all()
    others = [0, 1, 3, 4]
    assert torch.equal(output[others], expected[others])


def test_ids_of_minus_one_add_nothing(wrapper, experts):
    hidden, ids, weights = random_call(13, 6)
    ids[0, :] = -1
    ids[3, 1] = -1
    output = wrapper.forward(hidden, ids, weights)
    assert not output[0].any()
    assert_close(output, reference(experts, hidden, ids, weights))


def test_all_ids_minus_one_give_zeros_not_old_memory(wrapper):
    hidden, _, weights = random_call(14, 4)
    nowhere = torch.full((4, TOP_K), -1)
    for _ in range(3):
        torch.full((4, HIDDEN), float("nan"), dtype=hidden.dtype)  # freed memory that the output may reuse
        assert not wrapper.forward(hidden, nowhere, weights).any()


@pytest.mark.parametrize("call", ["forward", "submit"])
def test_zero_tokens_give_an_empty_result(wrapper, call):
    hidden, ids, weights = random_call(15, 0)
    if call == "forward":
        output = wrapper.forward(hidden, ids, weights)
    else:
        wrapper.submit_forward(hidden, ids, weights)
        output = wrapper.sync_forward(hidden)
    assert output.shape == (0, HIDDEN) and output.dtype == hidden.dtype


def test_mask_edited_in_place_takes_effect_with_the_next_call(experts):
    wrapper = loaded_wrapper(experts, num_gpu_experts=2)
    call = random_call(16, 16)
    assert_close(wrapper.forward(*call), reference(experts, *call, skip={0, 1}))
    wrapper.gpu_experts_mask[0] = False
    wrapper.gpu_experts_mask[5] = True
    wrapper.gpu_experts_mask[6] = True
    assert wrapper.num_gpu_experts == 3
    assert_close(wrapper.forward(*call), reference(experts, *call, skip={1, 5, 6}))
    wrapper.submit_forward(*call)
    assert_close(wrapper.sync_forward(call[0]), reference(experts, *call, skip={1, 5, 6}))


def test_the_callers_mask_is_copied(experts):
    mask = torch.zeros(EXPERTS, dtype=torch.bool)
    wrapper = loaded_wrapper(experts, gpu_experts_mask=mask)
    call = random_call(17, 4)
    mask.fill_(True)
    assert_close(wrapper.forward(*call), reference(experts, *call))


def test_all_experts_on_the_accelerator_leave_zeros(experts):
    wrapper = loaded_wrapper(experts, num_gpu_experts=EXPERTS)
    assert not wrapper.forward(*random_call(18, 4)).any()


def test_layers_of_other_threads_do_not_share_an_engine(experts):
    first, same = loaded_wrapper(experts), loaded_wrapper(experts)
    other = loaded_wrapper(experts, cpuinfer_threads=1)
    pools = loaded_wrapper(experts, threadpool_count=2, numa_nodes=[0, 0])
    assert first.cpu_infer is same.cpu_infer
    assert len({id(layer.cpu_infer) for layer in (first, other, pools)}) == 3
    assert (other.cpu_infer.threads, pools.cpu_infer.subpools, first.cpu_infer.threads) == (1, 2, 2)
    call = random_call(19, 7)
    expected = first.forward(*call)
    for layer in (same, other, pools):
        assert torch.equal(layer.forward(*call), expected)


def test_loading_again_replaces_the_weights(experts):
    wrapper = loaded_wrapper(experts)
    call = random_call(20, 4)
    newer = random_experts(seed=99)
    wrapper.load_weights_from_tensors(*newer, torch.arange(EXPERTS))
    assert_close(wrapper.forward(*call), reference(newer, *call))


def test_map_puts_checkpoint_experts_into_slots_also_from_tensors(experts):
    slots = torch.tensor([3, 1, 7, 0, 2, 6, 5, 4])
    wrapper = loaded_wrapper(experts)
    wrapper.load_weights_from_tensors(*experts, slots)
    call = random_call(21, 9)
    in_slots = [matrices[slots] for matrices in experts]
    assert_close(wrapper.forward(*call), reference(in_slots, *call))


def test_tensors_given_for_loading_may_be_strided_and_may_go_away(experts):
    gate, up, down = experts
    gate_up = torch.cat([gate, up], dim=1)
    tall = down.transpose(1, 2).contiguous()
    wrapper = loaded_wrapper(experts)
    half = gate.shape[1]
    wrapper.load_weights_from_tensors(gate_up[:, :half], gate_up[:, half:], tall.transpose(1, 2))
    gate_up.fill_(float("nan"))
    tall.fill_(float("nan"))
    call = random_call(22, 4)
    assert_close(wrapper.forward(*call), reference(experts, *call))


def test_swiglu_limit_clamps(experts):
    gate, up, down = experts
    limit = 0.25
    wrapper = loaded_wrapper(experts, swiglu_limit=limit)
    hidden, ids, weights = random_call(23, 4)
    expected = torch.zeros(4, HIDDEN, dtype=torch.float64)
    for token in range(4):
        x = hidden[token].double()
        for expert, weight in zip(ids[token].tolist(), weights[token].double(), strict=True):
            g = (gate[expert].double() @ x).clamp(max=limit)
            u = (up[expert].double() @ x).clamp(-limit, limit)
            expected[token] += weight * (down[expert].double() @ (torch.nn.functional.silu(g) * u))
    assert_close(wrapper.forward(hidden, ids, weights), expected)
