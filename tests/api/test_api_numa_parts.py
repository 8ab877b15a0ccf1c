"""Directories of the original converter load for any number of pools, with the very numbers they stand for.

The writer below places each byte by the closed form of its position, one element at a time.
"""

import pytest
import torch
from api_support import assert_close, random_call, reference, save_single
from format_support import load

from kt_kernel import detect_method
from kt_kernel.checkpoint.experts import layer_experts
from kt_kernel.checkpoint.reader import open_checkpoint
from kt_kernel.errors import CheckpointError, MissingTensorError

EXPERTS = 3
BITS = {"AMXINT8": 8, "AMXINT4": 4}


def _positions(rows: int, columns: int, bits: int) -> torch.Tensor:
    """Byte of each element; 4-bit ones of columns 64 to 127 of a tile are in the high nibble."""
    block, step = (64, 64) if bits == 8 else (128, 128)
    n, c = torch.arange(rows)[:, None], torch.arange(columns)[None]
    nb, kb = block * (n // block), 3584 * (c // 3584)
    nl, kl = (rows - nb).clamp(max=block), (columns - kb).clamp(max=3584)
    ni, ki = 32 * ((n - nb) // 32), step * ((c - kb) // step)
    r, x = n - nb - ni, c - kb - ki
    j = x % 64
    start = (nb * columns + kb * nl + ni * kl + ki * 32) * bits // 8
    return start + 1024 * (r // 16) + 64 * (j // 4) + 4 * (r % 16) + j % 4


def _packed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """int64 codes [rows, columns] -> the bytes of a part."""
    rows, columns = codes.shape
    at = _positions(rows, columns, bits).flatten()
    packed = torch.zeros(rows * columns * bits // 8, dtype=torch.int64)
    if bits == 8:
        packed[at] = codes.flatten() & 255
    else:
        high = (torch.arange(columns) % 128 >= 64).expand(rows, columns).flatten()
        packed.index_add_(0, at, (codes.flatten() & 15) << (4 * high))
    return packed.to(torch.uint8).view(torch.int8)


def _random_part(rows: int, columns: int, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [rows, columns] and the scales of its rows as the file has them."""
    largest = 127 if bits == 8 else 7
    codes = torch.randint(-largest, largest + 1, (rows, columns))
    return codes, (torch.rand(rows) + 0.5) / (largest * columns**0.5 * (16 if bits == 4 else 1))


def _converted(hidden: int, intermediate: int, bits: int, parts: int, experts: int = EXPERTS):
    """A layer's tensors, and the float64 gate, up, down they stand for."""
    torch.manual_seed(bits + parts)
    tensors, weights = {}, []
    share = intermediate // parts
    factor = 16 if bits == 4 else 1
    for projection, shape in (("gate", (share, hidden)), ("up", (share, hidden)), ("down", (hidden, share))):
        whole = []
        for expert in range(experts):
            made = [_random_part(*shape, bits) for _ in range(parts)]
            for part, (codes, scales) in enumerate(made):
                stem = f"blk.5.ffn_{projection}_exps.{expert}.numa.{part}"
                tensors[f"{stem}.weight"], tensors[f"{stem}.scale"] = _packed(codes, bits), scales
            values = [codes.double() * scales.double()[:, None] * factor for codes, scales in made]
            whole.append(torch.cat(values, dim=1 if projection == "down" else 0))
        weights.append(torch.stack(whole))
    return tensors, weights


@pytest.mark.parametrize("method", BITS)
@pytest.mark.parametrize(("hidden", "intermediate", "parts"), [(256, 256, 1), (128, 512, 2), (384, 768, 3)])
def test_any_number_of_pools_computes_with_the_converted_numbers(
    tmp_path, method, hidden, intermediate, parts
):
    tensors, weights = _converted(hidden, intermediate, BITS[method], parts)
    path = save_single(tmp_path / "model", tensors)
    assert detect_method(path) == method
    call = random_call(1, 9, experts=EXPERTS, hidden_size=hidden)
    sizes = {
        "layer_idx": 5,
        "num_experts": EXPERTS,
        "hidden_size": hidden,
        "moe_intermediate_size": intermediate,
        "activations": "bf16",
    }
    one, two = (load("AUTO", path, threadpool_count=pools, **sizes) for pools in (1, 2))
    assert one.method == method
    assert_close(one.forward(*call), reference(weights, *call))
    assert torch.equal(one.forward(*call), two.forward(*call))


@pytest.mark.parametrize("method", BITS)
def test_parts_wider_than_a_block_of_columns_are_read_exactly(tmp_path, method):
    hidden, intermediate, bits = 3584 + 128, 2 * 128, BITS[method]
    tensors, weights = _converted(hidden, intermediate, bits, 2, experts=1)
    path = save_single(tmp_path / "model", tensors)
    with layer_experts(
        open_checkpoint(path), 5, method, num_experts=1, hidden=hidden, intermediate=intermediate
    ) as layer:
        for matrices, expected in zip((layer.gate, layer.up, layer.down), weights, strict=True):
            (matrix,) = matrices
            if bits == 8:
                codes = matrix.weight.double()
            else:
                octets = matrix.weight
                codes = torch.stack((octets & 15, octets >> 4), dim=-1).flatten(1).double() - 8
            scales = matrix.scale.double().repeat_interleave(codes.shape[1] // matrix.scale.shape[1], 1)
            assert torch.equal(codes * scales, expected[0])


def test_another_shape_or_a_missing_part_is_named(tmp_path):
    tensors, _ = _converted(256, 256, 8, 2)
    sizes = {"layer_idx": 5, "num_experts": EXPERTS, "hidden_size": 256, "moe_intermediate_size": 256}
    path = save_single(tmp_path / "model", tensors)
    with pytest.raises(
        CheckpointError, match=r"blk.5.ffn_gate_exps.0.numa.0.weight.*32768, expected .* 65536"
    ):
        load("AMXINT8", path, **{**sizes, "hidden_size": 512})
    with pytest.raises(CheckpointError, match=r"num_experts is 2, but .* holds 3 experts under 'blk.5'"):
        load("AMXINT8", path, **{**sizes, "num_experts": 2, "num_experts_per_tok": 2})
    with pytest.raises(CheckpointError, match=r"AMXINT4 was asked for, but .* holds AMXINT8 \('blk.5.ffn_up"):
        load("AMXINT4", path, **sizes)
    del tensors["blk.5.ffn_down_exps.1.numa.1.scale"]
    path = save_single(tmp_path / "other", tensors)
    with pytest.raises(
        MissingTensorError, match=r"blk.5.ffn_down_exps.1.numa.1.scale.*convert the model again"
    ):
        load("AMXINT8", path, **sizes)
