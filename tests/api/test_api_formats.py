"""Every format from files and from tensors gives the numbers of the slow decoders, however it is written."""

import dataclasses
import json

import pytest
import torch
from api_support import assert_close, random_call, random_experts, reference
from format_support import (
    DEEPSEEK,
    EXPERTS,
    GPTQ_CONFIG,
    HIDDEN,
    INTERMEDIATE,
    METHODS,
    MIXTRAL,
    QUANTISED,
    checkpoint_tensors,
    decoded,
    load,
    make_layer,
    quantised,
    save,
)

from kt_kernel import detect_method
from kt_kernel.formats.matrices import LayerExperts
from kt_kernel.formats.quantize.experts import quantize_experts
from kt_kernel.formats.quantize.fp8 import to_fp8_blocks
from kt_kernel.formats.quantize.int4 import to_gptq_int4, to_packed_int4


def _call(seed=1, tokens=32, experts=EXPERTS, hidden=HIDDEN):
    return random_call(seed, tokens, experts=experts, hidden_size=hidden)


def _check(layer, weights, **call):
    call = _call(**call)
    assert_close(layer.forward(*call), reference(weights, *call))


def _mapped(layer: LayerExperts, change) -> LayerExperts:
    """Each matrix with its parts replaced by `change(matrix)`, a dict of fields."""
    parts = [[dataclasses.replace(m, **change(m)) for m in ms] for ms in (layer.gate, layer.up, layer.down)]
    return LayerExperts(*parts, group_size=layer.group_size)


@pytest.mark.parametrize("method", METHODS)
def test_file_and_tensors_give_the_numbers_of_the_format(tmp_path, method):
    layer = quantised(method)
    from_file = load(method, save(tmp_path / "model", method, checkpoint_tensors(method, layer)))
    _check(from_file, decoded(method, layer))
    from_tensors = make_layer(method)
    from_tensors.load_weights_from_tensors(*random_experts(1, EXPERTS, HIDDEN, INTERMEDIATE))
    for tokens in (1, 6, 40):
        call = _call(seed=tokens, tokens=tokens)
        assert torch.equal(from_file.forward(*call), from_tensors.forward(*call))


@pytest.mark.parametrize("method", METHODS)
def test_map_puts_checkpoint_experts_into_slots(tmp_path, method):
    layer = quantised(method)
    slots = torch.tensor([5, 2, 0, 1, 3, 4])
    path = save(tmp_path / "model", method, checkpoint_tensors(method, layer))
    _check(load(method, path, slots), [matrices[slots] for matrices in decoded(method, layer)])


@pytest.mark.parametrize("method", METHODS)
def test_two_pools_hold_the_same_experts(tmp_path, method):
    layer = quantised(method)
    path = save(tmp_path / "model", method, checkpoint_tensors(method, layer))
    one, two = (load(method, path, threadpool_count=pools) for pools in (1, 2))
    call = _call()
    assert torch.equal(one.forward(*call), two.forward(*call))


_FAMILIES = {
    "DeepSeek FP8": ("FP8", "model.layers.{}.mlp.experts", DEEPSEEK, None),
    "Kimi-K2-Thinking": ("RAWINT4", "model.layers.{}.mlp.experts", DEEPSEEK, None),
    "Kimi-K2.5": ("RAWINT4", "language_model.model.layers.{}.mlp.experts", DEEPSEEK, None),
    "GLM-4.7-FP8": ("FP8_PERCHANNEL", "model.layers.{}.mlp.experts", DEEPSEEK, None),
    "MiniMax-M2": ("FP8", "model.layers.{}.block_sparse_moe.experts", MIXTRAL, None),
    "MiniMax-M3": ("MXFP8", "language_model.model.layers.{}.block_sparse_moe.experts", MIXTRAL, None),
    "Qwen3-Next FP8": ("FP8", "model.layers.{}.mlp.experts", DEEPSEEK, None),
    "Qwen3.5 FP8": ("FP8", "model.language_model.layers.{}.mlp.experts", DEEPSEEK, None),
    "Qwen3 GPTQ": ("GPTQ_INT4", "model.layers.{}.mlp.experts", DEEPSEEK, None),
    "Mixtral GPTQ": ("GPTQ_INT4", "model.layers.{}.block_sparse_moe.experts", MIXTRAL, None),
    "Mistral native": ("FP8", "layers.{}.experts", MIXTRAL, ("weight", "weight_scale")),
    "DeepSeek-V4": ("MXFP4", "layers.{}.ffn.experts", MIXTRAL, None),
    "DeepSeek NVFP4": ("NVFP4", "model.layers.{}.mlp.experts", DEEPSEEK, None),
    "compressed-tensors MXFP4": (
        "MXFP4",
        "model.layers.{}.mlp.experts",
        DEEPSEEK,
        ("weight_packed", "weight_scale"),
    ),
}


@pytest.mark.parametrize("family", _FAMILIES)
def test_families_are_found_by_their_names(tmp_path, family):
    method, base, names, suffixes = _FAMILIES[family]
    layer = quantised(method)
    tensors = checkpoint_tensors(method, layer, base.format(7), names, suffixes)
    tensors |= checkpoint_tensors(method, quantised(method, seed=2), base.format(77), names, suffixes)
    tensors["model.layers.7.mlp.shared_experts.gate_proj.weight"] = torch.zeros(4, 4)
    path = save(tmp_path / "model", method, tensors)
    assert detect_method(path) == method
    _check(load(method, path, layer_idx=7), decoded(method, layer))


@pytest.mark.parametrize("method", METHODS)
def test_auto_is_the_method_of_the_checkpoint(tmp_path, method):
    layer = quantised(method)
    path = save(tmp_path / "model", method, checkpoint_tensors(method, layer))
    loaded = load("AUTO", path)
    assert loaded.method == method
    _check(loaded, decoded(method, layer))


@pytest.mark.parametrize(("method", "other_name"), [("AMXINT4", "MOE_INT4"), ("AMXINT8", "MOE_INT8")])
def test_two_names_of_a_method_read_the_same_files(tmp_path, method, other_name):
    path = save(tmp_path / "model", method, checkpoint_tensors(method, quantised(method)))
    call = _call()
    found, loaded = load(method, path), load(other_name, path)
    assert loaded.method == other_name and torch.equal(found.forward(*call), loaded.forward(*call))


@pytest.mark.parametrize("method", QUANTISED)
def test_saved_experts_load_as_they_were_quantised(tmp_path, method):
    experts = random_experts(1, EXPERTS, HIDDEN, INTERMEDIATE)
    made = make_layer(method, weight_path=tmp_path / "new" / "model", cpu_save=True, layer_idx=3)
    made.load_weights_from_tensors(*experts)
    config = {"quantization_config": GPTQ_CONFIG}  # what only GPTQ needs, and has no place in the tensors
    (tmp_path / "new" / "model" / "config.json").write_text(json.dumps(config))
    read = load("AUTO", tmp_path / "new" / "model", layer_idx=3)
    call = _call()
    assert read.method == method and torch.equal(made.forward(*call), read.forward(*call))


def test_auto_reads_packed_bfloat16_and_ignores_draft_layers_in_another_format(tmp_path):
    gate, up, down = random_experts(1, EXPERTS, HIDDEN, INTERMEDIATE)
    base = "model.language_model.layers.0.mlp.experts"
    tensors = {f"{base}.gate_up_proj": torch.cat([gate, up], dim=1), f"{base}.down_proj": down}
    draft = checkpoint_tensors("FP8", quantised("FP8"), "model.language_model.layers.1.mlp.experts")
    tensors["model.language_model.layers.2.mlp.experts.0.up_proj.weight"] = torch.zeros(2, 2).half()
    path = save(tmp_path / "model", "BF16", tensors | draft, {"text_config": {"num_hidden_layers": 1}})
    loaded = load("AUTO", path)
    assert loaded.method == "BF16"
    _check(loaded, (gate, up, down))
    _check(load("FP8", path, layer_idx=1), decoded("FP8", quantised("FP8")))


# ---- one format, written in several ways -------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "dtype"),
    [
        ("FP8", torch.bfloat16),
        ("FP8", torch.float8_e8m0fnu),
        ("FP8_PERCHANNEL", torch.bfloat16),
        ("FP8_PERCHANNEL", torch.float16),
        ("RAWINT4", torch.float16),
        ("RAWINT4", torch.float32),
        ("GPTQ_INT4", torch.float16),
        ("GPTQ_INT4", torch.float32),
    ],
)
def test_scales_of_other_dtypes(tmp_path, method, dtype):
    layer = _mapped(quantised(method), lambda m: {"scale": m.scale.to(dtype)})
    path = save(tmp_path / "model", method, checkpoint_tensors(method, layer))
    assert detect_method(path) == method
    _check(load(method, path), decoded(method, layer))


@pytest.mark.parametrize("suffix", ["weight_scale_inv", "weight_scale", "scale"])
@pytest.mark.parametrize("method", ["FP8", "FP8_PERCHANNEL", "FP8_PERCHANNEL [N, 1]", "MXFP8"])
def test_float8_scales_are_told_apart_by_shape_and_dtype_not_by_name(tmp_path, method, suffix):
    method, _, as_column = method.partition(" ")
    layer = quantised(method)
    if as_column:
        layer = _mapped(layer, lambda m: {"scale": m.scale[:, None]})
    tensors = checkpoint_tensors(method, layer, suffixes=("weight", suffix))
    path = save(tmp_path / "model", method, tensors)
    assert detect_method(path) == method
    _check(load(method, path), decoded(method, layer))


@pytest.mark.parametrize("method", ["MXFP8", "MXFP4"])
def test_powers_of_two_as_float8_or_as_bytes(tmp_path, method):
    layer = quantised(method)
    for directory, dtype in (("a", torch.uint8), ("b", torch.float8_e8m0fnu)):
        same = _mapped(layer, lambda m, dtype=dtype: {"scale": m.scale.view(dtype)})
        path = save(tmp_path / directory, method, checkpoint_tensors(method, same))
        assert detect_method(path) == method
        _check(load(method, path), decoded(method, layer))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_pairs_of_codes_as_signed_or_unsigned_bytes(tmp_path, dtype):
    layer = quantised("MXFP4")
    same = _mapped(layer, lambda m: {"weight": m.weight.view(dtype)})
    path = save(tmp_path / "model", "MXFP4", checkpoint_tensors("MXFP4", same))
    _check(load("AUTO", path), decoded("MXFP4", layer))


def test_packed_int4_as_bytes_with_shape_tensors(tmp_path):
    layer = quantised("RAWINT4")
    as_bytes = _mapped(layer, lambda m: {"weight": m.weight.view(torch.uint8)})
    tensors = checkpoint_tensors("RAWINT4", as_bytes)
    for name in [name for name in tensors if name.endswith("weight_packed")]:
        rows, half_columns = tensors[name].shape
        tensors[name.replace("packed", "shape")] = torch.tensor([rows, 2 * half_columns])
    _check(load("AUTO", save(tmp_path / "model", "RAWINT4", tensors)), decoded("RAWINT4", layer))


@pytest.mark.parametrize("group_size", [16, 32, 64, 128, 0])
@pytest.mark.parametrize("said", [False, True], ids=["by shapes", "by config.json"])
@pytest.mark.parametrize("method", ["RAWINT4", "GPTQ_INT4"])
def test_any_group_size(tmp_path, method, group_size, said):
    hidden, intermediate = 256, 128
    matrices = random_experts(1, EXPERTS, hidden, intermediate)
    quantise = {"RAWINT4": to_packed_int4, "GPTQ_INT4": to_gptq_int4}[method]
    layer = quantize_experts(method, *(list(tensor.unbind()) for tensor in matrices))

    def regroup(projection, tensor):
        for expert, matrix in enumerate(tensor):
            result = quantise(matrix.float(), group_size)
            old = projection[expert]
            projection[expert] = type(old)(old.name, result.weight, result.scale)

    for projection, tensor in zip((layer.gate, layer.up, layer.down), matrices, strict=True):
        regroup(projection, tensor)
    config = _config_saying(method, group_size if said else None)
    path = save(tmp_path / "model", method, checkpoint_tensors(method, layer), config)
    loaded = load("AUTO", path, hidden_size=hidden, moe_intermediate_size=intermediate)
    _check(loaded, decoded(method, layer), hidden=hidden)


def _config_saying(method, group_size):
    if method == "GPTQ_INT4":
        config = {"quant_method": "gptq", "bits": 4, "sym": True, "desc_act": False}
        if group_size is not None:
            config["group_size"] = group_size or -1
        return {"quantization_config": config}
    if group_size is None:
        return None
    weights = {"num_bits": 4, "type": "int", "symmetric": True}
    weights |= {"strategy": "group", "group_size": group_size} if group_size else {"strategy": "channel"}
    return {"text_config": {"quantization_config": {"config_groups": {"group_0": {"weights": weights}}}}}


def test_global_scales_of_gate_and_up_differ_and_may_be_divisors(tmp_path):
    layer = quantised("NVFP4")
    layer.up = [type(m)(m.name, m.weight, m.scale, m.global_scale * 4) for m in layer.up]
    exact = decoded("NVFP4", layer)
    path = save(tmp_path / "modelopt", "NVFP4", checkpoint_tensors("NVFP4", layer))
    _check(load("AUTO", path), exact)
    powers = _mapped(layer, lambda m: {"global_scale": 2.0**-11})
    inverted = _mapped(layer, lambda m: {"global_scale": 2.0**11})
    names = ("weight_packed", "weight_scale", "weight_global_scale")
    path = save(tmp_path / "llmcompressor", "NVFP4", checkpoint_tensors("NVFP4", inverted, suffixes=names))
    _check(load("AUTO", path), decoded("NVFP4", powers))


def test_gptq_configuration_in_its_older_file(tmp_path):
    layer = quantised("GPTQ_INT4")
    tensors = checkpoint_tensors("GPTQ_INT4", layer)
    for name in [name for name in tensors if name.endswith("qweight")]:
        stem = name.removesuffix("qweight")
        tensors[stem + "qzeros"] = torch.full((5, 8), 0x77777777, dtype=torch.int32)
        tensors[stem + "g_idx"] = torch.zeros(4, dtype=torch.int32)
        tensors[stem + "bias"] = torch.zeros(tensors[name].shape[1], dtype=torch.float16)
    path = save(tmp_path / "model", "GPTQ_INT4", tensors, {"hidden_size": HIDDEN})
    (path / "quantize_config.json").write_text(
        '{"bits": 4, "group_size": 32, "sym": true, "desc_act": false, "damp_percent": 0.01}'
    )
    _check(load("AUTO", path), decoded("GPTQ_INT4", layer))


# ---- the activation ----------------------------------------------------------------------------


@pytest.mark.parametrize("method", QUANTISED)
@pytest.mark.parametrize("constants", [(0.5, 0.0), (1.0, 1.702)])
def test_clamped_activations_for_every_method(method, constants):
    limit, alpha = constants
    layer = make_layer(method, swiglu_limit=limit, swiglu_alpha=alpha)
    layer.load_weights_from_tensors(*random_experts(1, EXPERTS, HIDDEN, INTERMEDIATE))
    gate, up, down = decoded(method, quantised(method))
    hidden, ids, weights = _call(tokens=5)
    expected = torch.zeros(5, HIDDEN, dtype=torch.float64)
    for token in range(5):
        x = 2 * hidden[token].double()
        for expert, weight in zip(ids[token].tolist(), weights[token].double(), strict=True):
            g, u = gate[expert] @ x, up[expert] @ x
            g = g.clamp(max=limit)
            u = u.clamp(-limit, limit)
            middle = g * torch.sigmoid(alpha * g) * (u + 1) if alpha else torch.nn.functional.silu(g) * u
            expected[token] += weight * (down[expert] @ middle)
    assert_close(layer.forward(2 * hidden, ids, weights), expected)


def test_blocks_are_counted_from_the_first_row_of_each_matrix():
    """A ragged last block has a scale of its own."""
    matrix = torch.ones(200, 130)
    matrix[128:] = 2
    matrix[:, 128:] *= 4
    result = to_fp8_blocks(matrix)
    assert torch.equal(result.scale * 448, torch.tensor([[1.0, 4.0], [2.0, 8.0]]))
