"""Experts copied out for device ranks are, byte for byte, slices of the checkpoint's tensors."""

import pytest
import torch
from api_support import random_call, random_experts
from format_support import (
    GPTQ_CONFIG,
    METHODS,
    checkpoint_tensors,
    load,
    make_layer,
    powers_of_two,
    quantised,
    save,
)

from kt_kernel.errors import CallOrderError, FeatureUnavailableError, InputError
from kt_kernel.formats.matrices import ExpertMatrix, LayerExperts
from kt_kernel.formats.quantize.int4 import to_gptq_int4, to_packed_int4

# Eight ranks still get a whole block of 128 columns; hidden_size is ragged.
EXPERTS, HIDDEN, INTERMEDIATE = 3, 160, 1024
SENTINEL = 0xA5
MARGIN = 64


def _load(method, intermediate=INTERMEDIATE, **changes):
    layer = make_layer(
        method, num_experts=EXPERTS, hidden_size=HIDDEN, moe_intermediate_size=intermediate, **changes
    )
    slots = torch.tensor([2, 0, 1])
    layer.load_weights_from_tensors(*random_experts(4, EXPERTS, HIDDEN, intermediate), slots)
    return layer, quantised(method, 4, EXPERTS, HIDDEN, intermediate), slots.tolist()


def _written_scales(method: str, matrix: ExpertMatrix) -> torch.Tensor:
    """The scales in the type in which they are written; two-dimensional."""
    scale = matrix.scale
    if method == "MXFP4":
        return powers_of_two(scale).bfloat16()
    return scale[:, None] if scale.dim() == 1 else scale


def _expected(method: str, layer: LayerExperts, expert: int, rank: int, ranks: int) -> list:
    """One rank's w13 codes and scales, w2 codes and scales; None for scales that the method does not have."""
    rows, columns = (1, 0) if method == "GPTQ_INT4" else (0, 1)  # GPTQ's matrices are stored transposed
    gate, up, down = layer.gate[expert], layer.up[expert], layer.down[expert]
    intermediate = gate.weight.shape[rows]
    width = intermediate // ranks

    def part(tensor, dim):
        """The entries along `dim` that the rank's `width` rows or columns touch."""
        per_entry = -(-intermediate // tensor.shape[dim])
        begin, end = rank * width // per_entry, -(-(rank + 1) * width // per_entry)
        return tensor.narrow(dim, begin, end - begin)

    def w13(first, second):
        return torch.cat([part(first, rows), part(second, rows)], dim=rows)

    codes = w13(gate.weight, up.weight), part(down.weight, columns)
    if method == "BF16":
        return [codes[0], None, codes[1], None]
    gate_scale, up_scale, down_scale = (_written_scales(method, matrix) for matrix in (gate, up, down))
    return [codes[0], w13(gate_scale, up_scale), codes[1], part(down_scale, columns)]


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8).reshape(-1)


class _Target:
    """Memory for one tensor between two margins that nobody may write to; None has the address 0."""

    def __init__(self, expected: torch.Tensor | None) -> None:
        self.expected = torch.empty(0) if expected is None else _as_bytes(expected)
        self.memory = torch.full((self.expected.numel() + 2 * MARGIN,), SENTINEL, dtype=torch.uint8)
        self.address = 0 if expected is None else self.memory.data_ptr() + MARGIN

    def check(self) -> None:
        if self.address:
            assert torch.equal(self.memory[MARGIN:-MARGIN], self.expected)
            margins = torch.cat([self.memory[:MARGIN], self.memory[-MARGIN:]])
            assert (margins == SENTINEL).all(), "bytes around the target were overwritten"


def _submit(layer, ranks, slot, targets):
    """`targets`: for each rank the four that `_expected` names."""
    lists = [[parts[index].address for parts in targets] for index in range(4)]
    layer.submit_write_weight_scale_to_buffer(ranks, slot, *lists)


def _check_write(method, layer, checkpoint, slot, expert, ranks):
    targets = [
        [_Target(part) for part in _expected(method, checkpoint, expert, rank, ranks)]
        for rank in range(ranks)
    ]
    _submit(layer, ranks, slot, targets)
    layer.sync_write_weight_scale_to_buffer()
    for parts in targets:
        for target in parts:
            target.check()


@pytest.mark.parametrize("pools", [1, 2])
@pytest.mark.parametrize("ranks", [1, 2, 8])
@pytest.mark.parametrize("method", METHODS)
def test_written_experts_are_slices_of_the_checkpoint(method, ranks, pools):
    layer, checkpoint, slots = _load(method, threadpool_count=pools)
    for slot in range(EXPERTS):
        _check_write(method, layer, checkpoint, slot, slots[slot], ranks)


@pytest.mark.parametrize("ranks", [3, 6, 12])
@pytest.mark.parametrize("method", METHODS)
def test_numbers_of_ranks_that_are_no_power_of_two_and_share_blocks(method, ranks):
    """With 6 and 12 ranks of 384 columns, neighbours have the scales of the same block of 128 columns."""
    layer, checkpoint, slots = _load(method, intermediate=384)
    _check_write(method, layer, checkpoint, 1, slots[1], ranks)


@pytest.mark.parametrize(
    ("ranks", "reason"), [(5, "equal parts"), (8, "scale groups of 32"), (96, "words of 8 codes")]
)
def test_cuts_that_the_layout_cannot_express(ranks, reason):
    """Of 384 columns, 8 parts have one group of 32 and half of the next, 96 parts half a word."""
    layer, _, _ = _load("RAWINT4", intermediate=384)
    with pytest.raises(InputError, match=reason):
        layer.submit_write_weight_scale_to_buffer(ranks, 0, *[[0] * ranks] * 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("method", ["RAWINT4", "GPTQ_INT4"])
@pytest.mark.parametrize("group_size", [128, 0])
def test_integer_scales_come_back_in_the_dtype_of_the_checkpoint(tmp_path, method, dtype, group_size):
    hidden = 256
    quantise = {"RAWINT4": to_packed_int4, "GPTQ_INT4": to_gptq_int4}[method]

    def quantised_as(matrix):
        result = quantise(matrix.float(), group_size)
        return ExpertMatrix("", result.weight, result.scale.to(dtype))

    projections = random_experts(4, EXPERTS, hidden, INTERMEDIATE)
    checkpoint = LayerExperts(*([quantised_as(matrix) for matrix in tensor] for tensor in projections))
    config = {"quantization_config": {**GPTQ_CONFIG, "group_size": group_size or -1}}
    path = save(tmp_path / "model", method, checkpoint_tensors(method, checkpoint), config)
    layer = load(method, path, num_experts=EXPERTS, hidden_size=hidden, moe_intermediate_size=INTERMEDIATE)
    for ranks in (1, 4):
        _check_write(method, layer, checkpoint, 1, 1, ranks)


def test_writes_and_forwards_take_turns():
    """Copying out does not change the weights, and runs in order with calls already queued."""
    layer, checkpoint, slots = _load("MXFP8")
    call = random_call(1, 20, experts=EXPERTS, hidden_size=HIDDEN)
    before = layer.forward(*call)
    targets = [[_Target(part) for part in _expected("MXFP8", checkpoint, slots[0], 0, 1)]]
    layer.submit_forward(*call)
    _submit(layer, 1, 0, targets)
    layer.sync_write_weight_scale_to_buffer()
    assert torch.equal(layer.sync_forward(call[0]), before)
    targets[0][0].check()
    assert torch.equal(layer.forward(*call), before)


def test_write_before_load():
    with pytest.raises(CallOrderError, match="the weights are not loaded"):
        make_layer("FP8").submit_write_weight_scale_to_buffer(1, 0, [0], [0], [0], [0])


def test_experts_with_biases_are_not_written_without_them(tmp_path):
    checkpoint = quantised("BF16", 4, EXPERTS, HIDDEN, INTERMEDIATE)
    name = "model.layers.0.mlp.experts.1.down_proj.bias"
    tensors = checkpoint_tensors("BF16", checkpoint) | {name: torch.ones(HIDDEN)}
    sizes = {"num_experts": EXPERTS, "hidden_size": HIDDEN, "moe_intermediate_size": INTERMEDIATE}
    layer = load("BF16", save(tmp_path / "model", "BF16", tensors), **sizes)
    targets = [[_Target(part) for part in _expected("BF16", checkpoint, 0, 0, 1)]]
    with pytest.raises(FeatureUnavailableError, match="have biases"):
        _submit(layer, 1, 0, targets)
    layer.sync_write_weight_scale_to_buffer()
    assert (targets[0][0].memory == SENTINEL).all()


def test_impossible_writes():
    layer, checkpoint, slots = _load("FP8")
    targets = [[_Target(part) for part in _expected("FP8", checkpoint, slots[0], 0, 1)]]
    lists = [[target.address] for target in targets[0]]
    for ranks, slot, changed, fragment in (
        (1, EXPERTS, lists, f"expert {EXPERTS} "),
        (1, -1, lists, "expert -1 "),
        (0, 0, [[]] * 4, "ranks"),
        (3, 0, [addresses * 3 for addresses in lists], "3"),
        (2, 0, lists, "2 device ranks"),
        (1, 0, [[0], *lists[1:]], "null pointer"),
        (1, 0, [lists[0], [0], *lists[2:]], "null pointer"),
    ):
        with pytest.raises(InputError) as caught:
            layer.submit_write_weight_scale_to_buffer(ranks, slot, *changed)
        assert "layer 0" in str(caught.value) and fragment in str(caught.value), str(caught.value)
    layer.sync_write_weight_scale_to_buffer()
    assert (targets[0][0].memory == SENTINEL).all()
