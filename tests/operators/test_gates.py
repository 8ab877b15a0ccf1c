"""Risk: an activation loses digits or reads the wrong half; an id leaves the embedding."""

from __future__ import annotations

import pytest
import torch
from native_and_twin import DTYPES, assert_close, native, numbers, twin

NAMES = ("silu_and_mul_cpu", "gelu_and_mul_cpu", "gelu_tanh_and_mul_cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_activation_is_its_twin(name, dtype):
    # 10000: longer than a piece that threads share.
    for seed, columns in enumerate((1536, 10000, 40, 14)):
        x = numbers(5, 2 * columns, dtype=dtype, seed=seed, scale=3)
        assert_close(native(name)(x), twin(name)(x), 2 if dtype == torch.float32 else 1.01)


@pytest.mark.parametrize("name", NAMES)
def test_activation_keeps_its_digits_everywhere(name):
    """Relative to float64, from where the result is denormal to where the gate is the identity."""
    gate = torch.linspace(-9, 9, 4001)
    x = torch.stack([gate, torch.ones_like(gate)], -1)
    wide = gate.double()
    exact = {
        "silu_and_mul_cpu": wide * torch.special.expit(wide),
        "gelu_and_mul_cpu": 0.5 * wide * torch.special.erfc(-wide / 2**0.5),
        "gelu_tanh_and_mul_cpu": wide
        * torch.special.expit((8 / torch.pi) ** 0.5 * (wide + 0.044715 * wide**3)),
    }[name]
    error = (native(name)(x)[:, 0].double() - exact).abs() / exact.abs().clamp(min=1e-37)
    assert error.max() < 1e-5, f"{error.max()} at {gate[error.argmax()]}"


@pytest.mark.parametrize("dtype", DTYPES)
def test_sigmoid_gate_of_a_wider_tensor(dtype):
    """Qwen3.5: the gate is the second half of each head of q."""
    q_and_gate = numbers(6, 4, 96, dtype=dtype, seed=1)
    for gate in (q_and_gate[..., 48:], q_and_gate[..., 48:].flatten(1)):
        x = numbers(6, 192, dtype=dtype, seed=2)
        expected = x.clone()
        assert native("fused_sigmoid_mul_cpu")(x, gate) is None
        twin("fused_sigmoid_mul_cpu")(expected, gate)
        assert_close(x, expected)


def test_gate_of_a_shared_expert():
    x, up = numbers(5, 64, dtype=torch.bfloat16, seed=1), numbers(5, 80, dtype=torch.bfloat16, seed=2)
    weight = numbers(1, 64, dtype=torch.bfloat16, seed=3, scale=0.1)
    packed = native("convert_weight_packed")(weight)
    for bias in (None, torch.tensor([0.5])):
        actual = native("fused_linear_sigmoid_mul")(x, packed, bias, True, up)
        assert_close(actual, twin("fused_linear_sigmoid_mul")(x, weight, bias, True, up))
    with pytest.raises(Exception, match="mat2"):
        native("fused_linear_sigmoid_mul")(x, weight, None, True, up)


@pytest.mark.parametrize("ids", [[3, 99, 0], [[3, 2], [1, 0]], []])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int8])
def test_embedding_is_its_rows(ids, dtype):
    weight = torch.arange(100 * 77).reshape(100, 77).to(dtype)
    for id_dtype in (torch.int64, torch.int32):
        tokens = torch.tensor(ids, dtype=id_dtype)
        assert torch.equal(native("kt_kernel::embedding")(tokens, weight), weight[tokens.long()])


def test_ids_outside_the_embedding_are_named():
    with pytest.raises(Exception, match="a token has the id 100; expected 0 to 99"):
        native("kt_kernel::embedding")(torch.tensor([1, 100]), torch.zeros(100, 8))
    with pytest.raises(Exception, match="a token has the id -1"):
        native("kt_kernel::embedding")(torch.tensor([-1]), torch.zeros(100, 8))
    with pytest.raises(Exception, match="expected an even number of columns"):
        native("silu_and_mul_cpu")(torch.zeros(2, 7))
