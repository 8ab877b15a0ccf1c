"""torch's float8 types: every code of float8_e4m3fn and every scale of float8_e8m0fnu, against ours."""

import torch
from observe import assert_same_numbers, observed

HIDDEN, INTERMEDIATE = 256, 256
_NAN_CODES = (0x7F, 0xFF)


def _every_code() -> torch.Tensor:
    """float8_e4m3fn [256, 256]: row n starts with code n, so each code meets each column; NaN left out."""
    codes = (torch.arange(256)[:, None] + torch.arange(256)) % 256
    for nan in _NAN_CODES:
        codes[codes == nan] = 0x01
    return codes.to(torch.uint8).view(torch.float8_e4m3fn)


def test_every_float8_code(tmp_path):
    codes = _every_code()
    scale = torch.tensor([[1.0, 2.0], [0.5, 3.0]])
    tensors = {"weight": codes, "weight_scale_inv": scale}
    (ours,) = observed(tmp_path / "model", "FP8", [tensors], hidden=HIDDEN, intermediate=INTERMEDIATE)
    assert_same_numbers(
        ours, codes.double() * scale.double().repeat_interleave(128, 0).repeat_interleave(128, 1)
    )


def test_float8_nan_stays_in_its_row(tmp_path):
    codes = _every_code().view(torch.uint8).clone()
    codes[5, 7], codes[200, 0] = _NAN_CODES
    weight = codes.view(torch.float8_e4m3fn)
    tensors = {"weight": weight, "weight_scale": torch.ones(HIDDEN, 1)}
    (ours,) = observed(
        tmp_path / "model", "FP8_PERCHANNEL", [tensors], hidden=HIDDEN, intermediate=INTERMEDIATE
    )
    expected = weight.double()
    expected[expected.isnan().any(dim=1)] = float("nan")  # NaN times the zeros of the other columns
    assert_same_numbers(ours, expected)


def test_every_power_of_two(tmp_path):
    """Bytes 0 to 254 are 2**-127 to 2**127; the codes are small, so that no product leaves float32."""
    bytes_ = (torch.arange(HIDDEN)[:, None] + torch.arange(INTERMEDIATE // 32)) % 255
    scale = bytes_.to(torch.uint8).view(torch.float8_e8m0fnu)
    codes = torch.tensor([0.5, 0.25, -0.125, -0.5] * (INTERMEDIATE // 4)).repeat(HIDDEN, 1)
    weight = codes.to(torch.float8_e4m3fn)
    tensors = {"weight": weight, "weight_scale_inv": scale}
    (ours,) = observed(
        tmp_path / "model", "MXFP8", [tensors], hidden=HIDDEN, intermediate=INTERMEDIATE, shift=29
    )
    assert_same_numbers(ours, weight.double() * scale.double().repeat_interleave(32, 1))
