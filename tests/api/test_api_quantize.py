"""Our quantisers lose no more than their format must, and nothing of what the format can represent."""

import pytest
import torch
from api_support import assert_close, nmse, reference
from format_support import E2M1, QUANTISED, decode, decoded, make_layer, powers_of_two

from kt_kernel.formats.quantize.experts import quantize_experts
from kt_kernel.formats.quantize.fp4 import to_mxfp4, to_nvfp4
from kt_kernel.formats.quantize.fp8 import to_fp8_rows, to_mxfp8
from kt_kernel.formats.quantize.integers import to_int4, to_int8

# Of normally distributed weights: what rounding to the codes costs, with a little room.
_NMSE = {
    "FP8": 8e-4,
    "FP8_PERCHANNEL": 8e-4,
    "MXFP8": 1.0e-3,
    "MXFP4": 1.5e-2,
    "NVFP4": 1.0e-2,
    "RAWINT4": 1.1e-2,
    "GPTQ_INT4": 1.6e-2,
    "AMXINT4": 1.6e-2,
    "AMXINT8": 8e-5,
}


def _decoded(method: str, matrix: torch.Tensor) -> torch.Tensor:
    """A bfloat16 [N, K] after quantising; [N, K] and its transpose make a layer."""
    layer = quantize_experts(method, [matrix], [matrix], [matrix.t().contiguous()])
    return decode(method, layer.gate[0])


@pytest.mark.parametrize("magnitude", [1e-30, 1e-3, 1.0, 1e30])
@pytest.mark.parametrize("method", QUANTISED)
def test_error_of_normal_weights_at_any_magnitude(method, magnitude):
    torch.manual_seed(1)
    matrix = (torch.randn(256, 384) * magnitude).bfloat16()
    assert nmse(_decoded(method, matrix), matrix.double()) <= _NMSE[method]


@pytest.mark.parametrize("method", QUANTISED)
def test_outliers_cost_only_their_own_group(method):
    torch.manual_seed(2)
    matrix = torch.randn(256, 384).bfloat16()
    matrix[3, 5] = 1000
    error = (_decoded(method, matrix) - matrix.double())[128:, 128:]
    assert error.square().sum() / matrix[128:, 128:].double().square().sum() <= 1.3 * _NMSE[method]


@pytest.mark.parametrize("method", QUANTISED)
def test_zeros_stay_zeros(method):
    matrix = torch.randn(256, 384).bfloat16()
    matrix[:, 128:256] = 0
    matrix[17] = 0
    decoded = _decoded(method, matrix)
    assert not decoded[:, 128:256].any() and not decoded[17].any() and decoded[18].any()
    assert not _decoded(method, torch.zeros(256, 384, dtype=torch.bfloat16)).any()


def _numbers_of(method: str) -> torch.Tensor:
    """Every number of the format, at the scale that its largest one calls for."""
    if method in ("RAWINT4", "GPTQ_INT4"):
        return torch.arange(-7, 9).clamp(max=7).double()
    if method in ("AMXINT4", "AMXINT8"):
        largest = 7 if method == "AMXINT4" else 127
        return torch.arange(-largest, largest + 1).double()
    if method in ("MXFP4", "NVFP4"):
        return E2M1 * (448 if method == "NVFP4" else 1)
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    codes = codes[codes.isfinite()]
    return torch.stack([codes, torch.full_like(codes, 448.0)], dim=1).flatten()


@pytest.mark.parametrize("method", QUANTISED)
def test_numbers_of_the_format_are_kept(method):
    """Each group holds the largest number, so the scale is known, and others."""
    numbers = _numbers_of(method)
    matrix = numbers.repeat(256 * 384 // len(numbers) + 1)[: 256 * 384].reshape(256, 384)
    assert torch.equal(_decoded(method, matrix.bfloat16()), matrix)


def test_fp4_ties_go_to_the_even_code():
    halfway = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    rounded = torch.tensor([0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0], dtype=torch.float64)
    row = torch.cat([halfway, -halfway, torch.tensor([6.0, -6.0])]).repeat(2)[None]
    expected = torch.cat([rounded, -rounded, torch.tensor([6.0, -6.0])]).repeat(2)[None]
    for result, scale in ((to_mxfp4(row), 1.0), (to_nvfp4(row), 1.0)):
        codes = torch.stack([result.weight & 15, result.weight >> 4], dim=-1).flatten(1).long()
        assert torch.equal(E2M1[codes] * scale, expected)


def test_microscaling_exponents_follow_the_specification_and_saturate():
    row = torch.ones(1, 32)
    row[0, 0] = 7.9  # exponent 2, as that of 6, the largest code; 7.9 itself saturates
    result = to_mxfp4(row)
    assert powers_of_two(result.scale).tolist() == [[1.0]]
    assert E2M1[result.weight[0, 0].item() & 15] == 6
    row[0, 0] = 500.0  # exponent 8, as that of 448
    result = to_mxfp8(row)
    assert powers_of_two(result.scale).tolist() == [[1.0]]
    assert result.weight[0, 0].item() == 448


def test_float8_codes_are_the_nearest():
    torch.manual_seed(3)
    matrix = torch.randn(8, 64)
    result = to_fp8_rows(matrix)
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    codes = codes[codes.isfinite()]
    wanted = matrix / result.scale[:, None]
    nearest = (wanted[..., None] - codes).abs().amin(-1)
    assert torch.equal((wanted - result.weight.float()).abs(), nearest)


@pytest.mark.parametrize(
    ("method", "hidden", "intermediate", "group_size"),
    [
        ("RAWINT4", 256, 128, 32),
        ("RAWINT4", 48, 80, 16),
        ("RAWINT4", 72, 40, 0),
        ("GPTQ_INT4", 256, 384, 128),
        ("GPTQ_INT4", 256, 192, 64),
        ("GPTQ_INT4", 72, 40, 0),
        ("FP8", 256, 128, 0),
        ("AMXINT4", 256, 192, 32),
        ("AMXINT8", 256, 128, 0),
    ],
)
def test_groups_are_the_usual_ones_or_the_largest_that_fit(method, hidden, intermediate, group_size):
    wide, tall = (
        torch.randn(*shape).bfloat16() for shape in ((intermediate, hidden), (hidden, intermediate))
    )
    assert quantize_experts(method, [wide], [wide], [tall]).group_size == group_size


@pytest.mark.parametrize(("quantise", "largest"), [(to_int8, 127), (to_int4, 7)])
def test_integer_codes_are_the_nearest_and_ties_go_to_the_even_one(quantise, largest):
    row = torch.tensor([largest, -largest, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5])
    matrix = torch.stack([row, row.flip(0) * 2])
    result = quantise(matrix, 8)
    octets = result.weight
    if largest == 7:
        octets = torch.stack([octets & 15, octets >> 4], dim=-1).flatten(1).to(torch.int8) - 8
    codes = [largest, -largest, 0, 2, 2, 0, -2, -2]
    assert octets.tolist() == [codes, codes[::-1]]
    assert result.scale.tolist() == [[1.0], [2.0]]


@pytest.mark.parametrize("quantise", [to_int8, to_int4])
def test_an_error_of_integer_codes_is_half_a_step_at_most(quantise):
    torch.manual_seed(5)
    matrix = torch.randn(16, 256) * torch.logspace(-20, 20, 16)[:, None]
    result = quantise(matrix, 32)
    octets = result.weight
    if octets.dtype is torch.uint8:
        octets = torch.stack([octets & 15, octets >> 4], dim=-1).flatten(1).double() - 8
    steps = result.scale.double().repeat_interleave(32, 1)
    assert ((octets.double() * steps - matrix.double()).abs() <= steps * (0.5 + 1e-6)).all()


@pytest.mark.parametrize("method", ["AMXINT4", "AMXINT8", "FP8"])
def test_float32_weights_are_rounded_once(method):
    """Not to bfloat16 first: other codes, and the result of the same numbers quantised outside."""
    torch.manual_seed(6)
    gate, up = torch.randn(2, 2, 64, 96).unbind()
    down = torch.randn(2, 96, 64)
    sizes = {"num_experts": 2, "num_experts_per_tok": 1, "hidden_size": 96, "moe_intermediate_size": 64}
    hidden, ids, weights = torch.randn(3, 96), torch.tensor([[0], [1], [0]]), torch.ones(3, 1)
    layer = make_layer(method, **sizes)
    layer.load_weights_from_tensors(gate, up, down)
    exact = decoded(method, quantize_experts(method, list(gate), list(up), list(down)))
    assert_close(
        layer.forward(hidden.bfloat16(), ids, weights), reference(exact, hidden.bfloat16(), ids, weights)
    )
    rounded = quantize_experts(method, *([m.bfloat16() for m in part] for part in (gate, up, down)))
    assert not torch.equal(exact[0], decoded(method, rounded)[0])
