"""Experts that a checkpoint keeps in one tensor for all: every format, transposed, alternating, biases."""

from __future__ import annotations

import pytest
import torch
from api_support import TOP_K
from format_support import EXPERTS, HIDDEN, METHODS, checkpoint_tensors, layer_arguments, quantised, save

from kt_kernel import KTMoEWrapper, detect_method
from kt_kernel.checkpoint.experts import layer_experts
from kt_kernel.checkpoint.reader import open_checkpoint
from kt_kernel.errors import CheckpointError
from kt_kernel.formats.matrices import LayerExperts

# Whole blocks of FP8 for gate alone.
INTERMEDIATE = 128
BASE = "model.layers.0.mlp.experts"
# Suffixes of codes, scales and global scale of packed tensors.
SUFFIXES = {
    "BF16": ("",),
    "FP8": ("", "_scale_inv"),
    "FP8_PERCHANNEL": ("", "_weight_scale"),
    "RAWINT4": ("_packed", "_scale"),
    "MXFP4": ("_packed", "_scale"),
    "MXFP8": (".weight", ".weight_scale_inv"),
    "NVFP4": ("", "_weight_scale", "_weight_scale_2"),
    "GPTQ_INT4": (".qweight", ".scales"),
    "AMXINT4": ("", "_scale"),
    "AMXINT8": (".weight", ".weight_scale"),
}
# Methods whose codes are elements of their own, so that a matrix may be stored transposed.
TRANSPOSABLE = ("BF16", "FP8", "FP8_PERCHANNEL", "MXFP8")


def _layer(method: str) -> LayerExperts:
    return quantised(method, intermediate=INTERMEDIATE)


def _parts(method: str, layer: LayerExperts) -> dict[str, list[torch.Tensor]]:
    """gate_up and down: codes, scales and global scale of all experts, as far as the method has them."""
    axis = 2 if method == "GPTQ_INT4" else 1

    def stack(matrices: list, part: str) -> torch.Tensor:
        return torch.stack([getattr(matrix, part) for matrix in matrices])

    parts = {"gate_up_proj": [], "down_proj": []}
    for part in ("weight", "scale")[: len(SUFFIXES[method])]:
        halves = [stack(layer.gate, part), stack(layer.up, part)]
        parts["gate_up_proj"].append(
            torch.cat([half.view(_bytes(half)) for half in halves], axis).view(halves[0].dtype)
        )
        parts["down_proj"].append(stack(layer.down, part))
    if len(SUFFIXES[method]) == 3:
        for name, matrices in (("gate_up_proj", layer.gate), ("down_proj", layer.down)):
            parts[name].append(torch.tensor([matrix.global_scale for matrix in matrices]))
    return parts


def _bytes(tensor: torch.Tensor) -> torch.dtype:
    """torch concatenates no float8_e8m0fnu."""
    return torch.uint8 if tensor.dtype.itemsize == 1 else tensor.dtype


def _tensors(method: str, parts: dict[str, list[torch.Tensor]], base: str = BASE) -> dict[str, torch.Tensor]:
    return {
        f"{base}.{name}{suffix}": tensor.contiguous()
        for name, tensors in parts.items()
        for suffix, tensor in zip(SUFFIXES[method], tensors, strict=True)
    }


def _load(path, method: str = "AUTO", **changes) -> KTMoEWrapper:
    sizes = {"moe_intermediate_size": INTERMEDIATE, "weight_path": path, "method": method}
    wrapper = KTMoEWrapper(**{**layer_arguments("AUTO"), **sizes, **changes})
    wrapper.load_weights()
    return wrapper


def _call(tokens: int = 20) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    return (
        torch.randn(tokens, HIDDEN, generator=generator),
        torch.randint(0, EXPERTS, (tokens, TOP_K), generator=generator),
        torch.rand(tokens, TOP_K, generator=generator),
    )


def _same_scales(method: str, layer: LayerExperts) -> LayerExperts:
    """gate and up share a global scale where they are one tensor."""
    if method == "NVFP4":
        layer.up = [
            type(up)(up.name, up.weight, up.scale, gate.global_scale)
            for gate, up in zip(layer.gate, layer.up, strict=True)
        ]
    return layer


@pytest.mark.parametrize("method", METHODS)
def test_packed_experts_are_those_stored_apart(tmp_path, method):
    layer = _same_scales(method, _layer(method))
    apart = save(tmp_path / "apart", method, checkpoint_tensors(method, layer))
    packed = save(tmp_path / "packed", method, _tensors(method, _parts(method, layer)))
    assert detect_method(packed) == method
    assert torch.equal(_load(packed).forward(*_call()), _load(apart, method).forward(*_call()))


@pytest.mark.parametrize("method", TRANSPOSABLE)
def test_transposed_matrices(tmp_path, method):
    """Llama-4's, whose layers call them otherwise, too."""
    layer = _layer(method)
    apart = save(tmp_path / "apart", method, checkpoint_tensors(method, layer))
    parts = {
        name: [t.transpose(1, 2) if t.ndim == 3 else t for t in tensors]
        for name, tensors in _parts(method, layer).items()
    }
    base = "language_model.model.layers.0.feed_forward.experts"
    packed = save(tmp_path / "packed", method, _tensors(method, parts, base))
    assert detect_method(packed) == method
    assert torch.equal(_load(packed).forward(*_call()), _load(apart, method).forward(*_call()))


@pytest.mark.parametrize("method", ["BF16", "FP8"])
def test_gate_and_up_in_tensors_of_their_own(tmp_path, method):
    """Step-3.5's; blocks of scales may end in the middle of a matrix's rows."""
    layer = quantised(method, intermediate=96)
    apart = save(tmp_path / "apart", method, checkpoint_tensors(method, layer))
    tensors = {}
    for name, matrices in (("gate_proj", layer.gate), ("up_proj", layer.up), ("down_proj", layer.down)):
        for suffix, part in (("weight", "weight"), ("weight_scale_inv", "scale"))[: len(SUFFIXES[method])]:
            stacked = torch.stack([getattr(matrix, part) for matrix in matrices])
            tensors[f"model.layers.0.moe.{name}.{suffix}"] = stacked
    tensors["model.layers.0.moe.gate.weight"] = torch.zeros(EXPERTS, HIDDEN)
    packed = save(tmp_path / "packed", method, tensors)
    assert detect_method(packed) == method
    got, expected = (
        _load(path, method, moe_intermediate_size=96).forward(*_call()) for path in (packed, apart)
    )
    assert torch.equal(got, expected)


def test_experts_stay_in_the_mapped_file(tmp_path):
    """Qwen3.5's: a copy would be the layer twice more, while it loads."""
    tensors = _tensors("FP8", _parts("FP8", _layer("FP8")))
    path = save(tmp_path / "model", "FP8", tensors)
    checkpoint = open_checkpoint(path)
    mapped = {checkpoint.view(name).untyped_storage().data_ptr() for name in tensors}
    sizes = {"num_experts": EXPERTS, "hidden": HIDDEN, "intermediate": INTERMEDIATE}
    with layer_experts(checkpoint, 0, "FP8", **sizes) as experts:
        stored = [tensor for matrix in experts.all() for tensor in (matrix.weight, matrix.scale)]
        assert all(tensor.is_contiguous() for tensor in stored)
        assert {tensor.untyped_storage().data_ptr() for tensor in stored} <= mapped


def _alternating(tensor: torch.Tensor) -> torch.Tensor:
    gate, up = tensor.chunk(2, dim=1)
    return torch.stack((gate, up), 2).flatten(1, 2)


@pytest.mark.parametrize("bias", ["_bias", ".bias"])
@pytest.mark.parametrize("method", ["BF16", "MXFP4", "NVFP4", "FP8_PERCHANNEL", "RAWINT4"])
def test_alternating_rows_and_biases(tmp_path, method, bias):
    """gpt-oss's, whose biases tell the order."""
    layer = _same_scales(method, _layer(method))
    generator = torch.Generator().manual_seed(4)
    biases = {
        "gate_up_proj": torch.randn(EXPERTS, 2 * INTERMEDIATE, generator=generator).bfloat16(),
        "down_proj": torch.randn(EXPERTS, HIDDEN, generator=generator).bfloat16(),
    }
    one_by_one = checkpoint_tensors(method, layer)
    halves = (*biases["gate_up_proj"].chunk(2, 1), biases["down_proj"])
    for name, rows in zip(("gate_proj", "up_proj", "down_proj"), halves, strict=True):
        one_by_one |= {f"{BASE}.{expert}.{name}.bias": row.clone() for expert, row in enumerate(rows)}
    apart = save(tmp_path / "apart", method, one_by_one)
    parts = _parts(method, layer)
    parts["gate_up_proj"] = [_alternating(t) if t.ndim > 1 else t for t in parts["gate_up_proj"]]
    tensors = _tensors(method, parts)
    tensors[f"{BASE}.gate_up_proj{bias}"] = _alternating(biases["gate_up_proj"]).contiguous()
    tensors[f"{BASE}.down_proj{bias}"] = biases["down_proj"]
    packed = save(tmp_path / "packed", method, tensors)
    without = save(tmp_path / "without", method, checkpoint_tensors(method, layer))
    got = _load(packed).forward(*_call())
    assert torch.equal(got, _load(apart, method).forward(*_call()))
    assert not torch.allclose(got, _load(without, method).forward(*_call()))


def test_a_scale_of_gate_and_up_together_is_refused(tmp_path):
    layer = quantised("FP8")  # 96 rows each: the second block of 128 is half gate's
    parts = _parts("FP8", layer)
    parts["gate_up_proj"][1] = parts["gate_up_proj"][1][:, :2]
    path = save(tmp_path / "model", "FP8", _tensors("FP8", parts))
    with pytest.raises(CheckpointError, match="a scale covers 128 rows, of both"):
        _load(path, moe_intermediate_size=96)


@pytest.mark.parametrize("part", ["gate_up_proj_scale_inv", "down_proj"])
def test_a_shape_that_does_not_fit_is_named(tmp_path, part):
    tensors = _tensors("FP8", _parts("FP8", _layer("FP8")))
    tensors[f"{BASE}.{part}"] = tensors[f"{BASE}.{part}"][:, :-1].contiguous()
    path = save(tmp_path / "model", "FP8", tensors)
    with pytest.raises(CheckpointError, match=rf"{part}' in .* has shape .*, expected"):
        _load(path)
