"""Checkpoints of compressed-tensors: quantised, packed and decoded by that package, and decoded by us."""

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from observe import assert_same_numbers, observed

HIDDEN, INTERMEDIATE, EXPERTS = 384, 256, 2


def _scheme(**weights) -> QuantizationScheme:
    return QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))


def _config(name: str, scheme: QuantizationScheme) -> dict:
    """config.json as llm-compressor writes it."""
    group = {"targets": ["Linear"], "weights": scheme.weights.model_dump(mode="json")}
    said = {"quant_method": "compressed-tensors", "format": name, "config_groups": {"group_0": group}}
    return {"quantization_config": said}


def _random_matrices() -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(HIDDEN, INTERMEDIATE) / 16 for _ in range(EXPERTS)]


def _scales(
    matrix: torch.Tensor, args: QuantizationArgs, dtype: torch.dtype, global_scale=None
) -> torch.Tensor:
    """[N, groups], by the package's own rule."""
    groups = matrix.unflatten(1, (-1, args.group_size or matrix.shape[1]))
    scales, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), args, global_scale)
    return scales.to(dtype)


def _compressed(name: str, scheme: QuantizationScheme, state: dict) -> tuple[dict, torch.Tensor]:
    """The package's tensors of one matrix, and what it decodes them to, [N, K].

    It decodes in the dtype of the scales, so they are given to it as float32.
    """
    compressor = BaseCompressor.get_value_from_registry(name)
    tensors = compressor.compress(state, scheme)
    exact = dict(tensors)
    if exact["weight_scale"].dtype in (torch.bfloat16, torch.float16):
        exact["weight_scale"] = exact["weight_scale"].float()
    return tensors, compressor.decompress(exact, scheme)["weight"]


def _check(tmp_path, method, name, scheme, states, **options):
    results = [_compressed(name, scheme, state) for state in states]
    ours = observed(
        tmp_path / "model",
        method,
        [tensors for tensors, _ in results],
        hidden=HIDDEN,
        intermediate=INTERMEDIATE,
        config=_config(name, scheme),
        **options,
    )
    for actual, (_, expected) in zip(ours, results, strict=True):
        assert_same_numbers(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group_size", [32, 128, None])
def test_pack_quantized_int4(tmp_path, group_size, dtype):
    strategy = "channel" if group_size is None else "group"
    scheme = _scheme(num_bits=4, type="int", symmetric=True, strategy=strategy, group_size=group_size)
    states = [
        {"weight": matrix, "weight_scale": _scales(matrix, scheme.weights, dtype)}
        for matrix in _random_matrices()
    ]
    _check(tmp_path, "RAWINT4", "pack-quantized", scheme, states, group_size=group_size or 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float_quantized_per_channel(tmp_path, dtype):
    scheme = _scheme(num_bits=8, type="float", symmetric=True, strategy="channel")
    states = [
        {"weight": matrix, "weight_scale": _scales(matrix, scheme.weights, dtype)}
        for matrix in _random_matrices()
    ]
    _check(tmp_path, "FP8_PERCHANNEL", "float-quantized", scheme, states)


def test_mxfp8(tmp_path):
    scheme = _scheme(
        num_bits=8, type="float", symmetric=True, strategy="group", group_size=32, scale_dtype=torch.uint8
    )
    states = [
        {"weight": matrix, "weight_scale": _scales(matrix, scheme.weights, torch.float32)}
        for matrix in _random_matrices()
    ]
    _check(tmp_path, "MXFP8", "mxfp8-quantized", scheme, states)


def test_mxfp4_pack_quantized(tmp_path):
    scheme = _scheme(
        num_bits=4, type="float", symmetric=True, strategy="group", group_size=32, scale_dtype=torch.uint8
    )
    states = [
        {"weight": matrix, "weight_scale": _scales(matrix, scheme.weights, torch.float32)}
        for matrix in _random_matrices()
    ]
    _check(tmp_path, "MXFP4", "mxfp4-pack-quantized", scheme, states)


def test_nvfp4_pack_quantized(tmp_path):
    """Its decompressor rounds to bfloat16, so the steps it consists of are called with float32."""
    scheme = _scheme(num_bits=4, type="float", symmetric=True, strategy="tensor_group", group_size=16)
    compressor = BaseCompressor.get_value_from_registry("nvfp4-pack-quantized")
    compressed, exact = [], []
    for matrix in _random_matrices():
        global_scale = generate_gparam(matrix.amin(), matrix.amax()).reshape(1)
        scales = _scales(matrix, scheme.weights, torch.float32, global_scale)
        state = {"weight": matrix, "weight_scale": scales, "weight_global_scale": global_scale}
        compressed.append(tensors := compressor.compress(state, scheme))
        codes = unpack_fp4_from_uint8(tensors["weight_packed"], HIDDEN, INTERMEDIATE, torch.float32)
        exact.append(dequantize(codes, tensors["weight_scale"].float(), global_scale=global_scale))
    ours = observed(
        tmp_path / "model",
        "NVFP4",
        compressed,
        hidden=HIDDEN,
        intermediate=INTERMEDIATE,
        config=_config("nvfp4-pack-quantized", scheme),
    )
    for actual, expected in zip(ours, exact, strict=True):
        assert_same_numbers(actual, expected)


def test_float_quantized_blocks(tmp_path):
    scheme = _scheme(num_bits=8, type="float", symmetric=True, strategy="block", block_structure=[128, 128])
    states = []
    for matrix in _random_matrices():
        blocks = matrix.unflatten(1, (-1, 128)).unflatten(0, (-1, 128))
        scales, _ = calculate_qparams(blocks.amin((1, 3)), blocks.amax((1, 3)), scheme.weights)
        states.append({"weight": matrix, "weight_scale": scales})
    _check(tmp_path, "FP8", "float-quantized", scheme, states)
