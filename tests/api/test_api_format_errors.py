"""Each wrong quantised checkpoint gives one sentence: the tensor, what it is, what it should be."""

import os

import pytest
import torch
from api_support import random_experts
from format_support import (
    EXPERTS,
    GPTQ_CONFIG,
    HIDDEN,
    INTERMEDIATE,
    METHODS,
    QUANTISED,
    SUFFIXES,
    checkpoint_tensors,
    load,
    make_layer,
    quantised,
    save,
)

from kt_kernel import detect_method
from kt_kernel.errors import (
    CheckpointError,
    CheckpointPathError,
    ConfigurationError,
    InputError,
    KTError,
    MethodError,
    MissingTensorError,
)

_STEM = "model.layers.0.mlp.experts.3.up_proj"
_DOWN = "model.layers.0.mlp.experts.3.down_proj"


def _refused(path, method, error=CheckpointError, **changes) -> str:
    with pytest.raises(error) as caught:
        load(method, path, **changes)
    message = str(caught.value)
    assert "\n" not in message and (caught.value.__context__ is None or caught.value.__suppress_context__)
    return message


def _broken(tmp_path, method, change, config=None):
    """A checkpoint whose tensors went through `change(tensors)`."""
    tensors = checkpoint_tensors(method, quantised(method))
    change(tensors)
    return save(tmp_path / "model", method, tensors, config)


def _reshaped(name, rows, columns):
    def change(tensors):
        tensors[name] = tensors[name].new_zeros(rows, columns)

    return change


def _scale_of(method, stem=_STEM):
    return f"{stem}.{SUFFIXES[method][1]}"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("asked", METHODS)
def test_method_asked_for_and_another_found(tmp_path, method, asked):
    if method == asked:
        return
    message = _refused(_broken(tmp_path, method, lambda tensors: None), asked)
    assert f"method {asked} was asked for" in message and f"holds {method} (" in message
    assert f"use method {method} or AUTO" in message and os.path.realpath(tmp_path) in message


@pytest.mark.parametrize("method", QUANTISED)
def test_scales_of_another_shape(tmp_path, method):
    message = _refused(_broken(tmp_path, method, _reshaped(_scale_of(method), 7, 9)), method)
    assert f"'{_scale_of(method)}'" in message and "[7, 9], expected [" in message


@pytest.mark.parametrize("method", METHODS)
def test_codes_of_another_shape(tmp_path, method):
    name = f"{_STEM}.{SUFFIXES[method][0]}"
    message = _refused(_broken(tmp_path, method, _reshaped(name, 7, 9)), method)
    assert f"'{name}'" in message and "[7, 9], expected [" in message


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("part", [0, 1, 2])
def test_missing_codes_scales_and_global_scales(tmp_path, method, part):
    if part >= len(SUFFIXES[method]):
        return
    name = f"{_STEM}.{SUFFIXES[method][part]}"
    message = _refused(_broken(tmp_path, method, lambda t: t.pop(name)), method, MissingTensorError)
    assert f"'{name}' is not in the checkpoint" in message


@pytest.mark.parametrize("method", QUANTISED)
def test_no_scales_at_all(tmp_path, method):
    def without_scales(tensors):
        for name in list(tensors):
            if not name.endswith(SUFFIXES[method][0]):
                del tensors[name]

    path = _broken(tmp_path, method, without_scales)
    for asked in (method, "AUTO"):
        message = _refused(path, asked, MissingTensorError)
        assert "without its scales" in message and SUFFIXES[method][1] in message


@pytest.mark.parametrize("method", QUANTISED)
def test_scales_of_a_dtype_that_the_format_does_not_have(tmp_path, method):
    def as_doubles(tensors):
        tensors[_scale_of(method)] = tensors[_scale_of(method)].double()

    message = _refused(_broken(tmp_path, method, as_doubles), method)
    assert f"'{_scale_of(method)}'" in message and "dtype F64, but method" in message


@pytest.mark.parametrize("method", ["FP8", "RAWINT4"])
def test_scales_of_two_dtypes_in_one_layer(tmp_path, method):
    def one_other(tensors):
        scale = tensors[_scale_of(method)]
        tensors[_scale_of(method)] = scale.to(torch.float32 if method == "RAWINT4" else torch.bfloat16)

    message = _refused(_broken(tmp_path, method, one_other), method)
    assert _STEM in message and "torch.float32" in message and "torch.bfloat16" in message


@pytest.mark.parametrize(
    ("method", "hidden", "multiple"),
    [("RAWINT4", 71, 8), ("MXFP4", 71, 32), ("MXFP8", 80, 32), ("NVFP4", 71, 16), ("GPTQ_INT4", 71, 8)],
)
def test_widths_that_the_format_cannot_pack(method, hidden, multiple):
    for sizes in ({"hidden_size": hidden}, {"moe_intermediate_size": hidden}):
        with pytest.raises(
            ConfigurationError, match=f"is {hidden}, but method {method} .* multiple of {multiple}"
        ):
            make_layer(method, **sizes)


# ---- groups --------------------------------------------------------------------------------------


def _saying(method, **said):
    if method == "GPTQ_INT4":
        return {"quantization_config": GPTQ_CONFIG | said}
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32} | said
    return {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "config_groups": {"group_0": {"weights": weights}},
        }
    }


@pytest.mark.parametrize("method", ["RAWINT4", "GPTQ_INT4"])
def test_group_size_unlike_config_json(tmp_path, method):
    path = _broken(tmp_path, method, lambda tensors: None, _saying(method, group_size=16))
    message = _refused(path, method)
    assert "groups of 16 columns" in message and "experts.0.gate_proj" in message and "expected [" in message


@pytest.mark.parametrize("method", ["RAWINT4", "GPTQ_INT4"])
def test_group_size_that_does_not_divide_the_layer(tmp_path, method):
    path = _broken(tmp_path, method, lambda tensors: None, _saying(method, group_size=64))
    message = _refused(path, method)
    assert "groups of 64 columns" in message and f"hidden_size is {HIDDEN}" in message


def test_groups_that_do_not_divide_the_columns_evenly(tmp_path):
    def seven_scales(tensors):
        for name in tensors:
            if name.endswith("gate_proj.weight_scale"):
                tensors[name] = tensors[name].new_zeros(INTERMEDIATE, 7)

    message = _refused(_broken(tmp_path, "RAWINT4", seven_scales), "RAWINT4")
    assert "groups of 22 columns" in message and f"hidden_size is {HIDDEN}" in message


@pytest.mark.parametrize("method", ["RAWINT4", "GPTQ_INT4"])
def test_groups_too_small_for_the_kernels(tmp_path, method):
    axis = 1 if method == "RAWINT4" else 0

    def groups_of_8(tensors):
        for name in tensors:
            if name.endswith(("scale", "scales")):
                tensors[name] = tensors[name].repeat_interleave(4, dim=axis)

    message = _refused(_broken(tmp_path, method, groups_of_8, _saying(method, group_size=8)), method)
    assert "layer 0" in message and "8" in message and "16" in message


# ---- what the kernels cannot take into account ---------------------------------------------------


def test_zero_points_of_compressed_tensors(tmp_path):
    name = f"{_DOWN}.weight_zero_point"

    def with_zero_points(tensors):
        tensors[name] = torch.zeros(3, 5, dtype=torch.int32)

    assert f"'{name}'" in _refused(_broken(tmp_path, "RAWINT4", with_zero_points), "RAWINT4")
    path = _broken(tmp_path, "RAWINT4", lambda tensors: None, _saying("RAWINT4", symmetric=False))
    assert "symmetric=false" in _refused(path, "RAWINT4") and "symmetric=true" in _refused(path, "AUTO")


def test_zero_points_of_gptq(tmp_path):
    name = f"{_DOWN}.qzeros"

    def with_other_zero_points(tensors):
        tensors[name] = torch.tensor([[0x77777777, 0x77767777]], dtype=torch.int32)

    message = _refused(_broken(tmp_path, "GPTQ_INT4", with_other_zero_points), "GPTQ_INT4")
    assert f"'{name}'" in message and "zero points other than 8" in message


@pytest.mark.parametrize(
    ("said", "fragment"),
    [
        ({"desc_act": True}, "desc_act=true, but only desc_act=false"),
        ({"sym": False}, "sym=false, but only sym=true"),
        ({"bits": 8}, "bits=8, but only bits=4"),
        ({"quant_method": "awq"}, 'quant_method="awq"'),
        ({"sym": None}, "sym=null"),
    ],
)
@pytest.mark.parametrize("asked", ["GPTQ_INT4", "AUTO"])
def test_gptq_of_a_kind_without_kernels(tmp_path, said, fragment, asked):
    path = _broken(tmp_path, "GPTQ_INT4", lambda tensors: None, _saying("GPTQ_INT4", **said))
    assert fragment in _refused(path, asked)


def test_gptq_that_does_not_say_what_it_is(tmp_path):
    path = _broken(tmp_path, "GPTQ_INT4", lambda tensors: None, {"hidden_size": HIDDEN})
    assert "says nothing about the quantisation" in _refused(path, "GPTQ_INT4")


@pytest.mark.parametrize(
    ("said", "fragment"),
    [({"num_bits": 8}, "num_bits=8, but only num_bits=4"), ({"actorder": "group"}, 'actorder="group"')],
)
def test_compressed_tensors_of_a_kind_without_kernels(tmp_path, said, fragment):
    path = _broken(tmp_path, "RAWINT4", lambda tensors: None, _saying("RAWINT4", **said))
    assert fragment in _refused(path, "RAWINT4")


@pytest.mark.parametrize(
    "said",
    [
        {"quant_method": "fp8", "weight_block_size": [64, 64]},
        {"config_groups": {"group_0": {"weights": {"block_structure": [1, 128]}}}},
    ],
)
def test_blocks_of_another_size(tmp_path, said):
    path = _broken(tmp_path, "FP8", lambda tensors: None, {"quantization_config": said})
    assert "but only block size=[128, 128]" in _refused(path, "FP8")


def test_bias_of_another_length(tmp_path):
    name = f"{_DOWN}.bias"

    def with_bias(tensors):
        tensors[name] = torch.ones(HIDDEN + 1)

    message = _refused(_broken(tmp_path, "BF16", with_bias), "BF16")
    assert f"'{name}'" in message and f"has shape [{HIDDEN + 1}], expected [{HIDDEN}]" in message


def test_shape_tensor_that_contradicts_the_codes(tmp_path):
    def lying(tensors):
        tensors[f"{_STEM}.weight_shape"] = torch.tensor([INTERMEDIATE, HIDDEN - 1])

    message = _refused(_broken(tmp_path, "RAWINT4", lying), "RAWINT4")
    assert f"[{INTERMEDIATE}, {HIDDEN - 1}], expected [{INTERMEDIATE}, {HIDDEN}]" in message


@pytest.mark.parametrize("method", ["MXFP4", "MXFP8"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e8m0fnu])
def test_power_of_two_that_is_none(tmp_path, method, dtype):
    def with_nan(tensors):
        for name in tensors:
            if name.endswith(SUFFIXES[method][1]):
                tensors[name] = tensors[name].view(dtype)
        tensors[_scale_of(method)].view(torch.uint8)[2, 1] = 255

    message = _refused(_broken(tmp_path, method, with_nan), method)
    assert "255" in message and f"{_STEM}.weight" in message


# ---- the whole checkpoint ------------------------------------------------------------------------


@pytest.mark.parametrize("asked", ["FP8", "RAWINT4", "AUTO"])
def test_layers_of_different_formats(tmp_path, asked):
    tensors = checkpoint_tensors("RAWINT4", quantised("RAWINT4"))
    tensors |= checkpoint_tensors("FP8", quantised("FP8"), "model.layers.5.mlp.experts")
    path = save(tmp_path / "model", asked, tensors)
    message = _refused(path, asked)
    assert "mixes formats: layer 0 holds RAWINT4 (" in message and "layer 5 holds FP8 (" in message


def test_packed_experts_without_their_scales(tmp_path):
    base = "model.layers.0.mlp.experts"
    tensors = {
        f"{base}.gate_up_proj": torch.zeros(EXPERTS, 2 * INTERMEDIATE, HIDDEN).to(torch.float8_e4m3fn),
        f"{base}.down_proj": torch.zeros(EXPERTS, HIDDEN, INTERMEDIATE).to(torch.float8_e4m3fn),
    }
    message = _refused(save(tmp_path / "model", "FP8", tensors), "FP8")
    assert "gate_up_proj' in" in message and "no method reads it" in message


@pytest.mark.parametrize(
    ("dtype", "fragment"),
    [
        (torch.float16, "convert the checkpoint to bfloat16"),
        (torch.float8_e5m2, "which no method reads"),
        (torch.int16, "which no method reads"),
    ],
)
def test_formats_that_no_method_reads(tmp_path, dtype, fragment):
    tensors = {
        name: tensor.to(dtype) for name, tensor in checkpoint_tensors("BF16", quantised("BF16")).items()
    }
    path = save(tmp_path / "model", "BF16", tensors)
    for asked in ("BF16", "AUTO"):
        assert fragment in _refused(path, asked)


def test_auto_without_anything_to_look_at(tmp_path):
    with pytest.raises(MethodError, match="AUTO needs weight_path"):
        make_layer("AUTO")
    with pytest.raises(CheckpointPathError, match="does not exist"):
        detect_method(tmp_path / "nowhere")
    path = save(tmp_path / "dense", "BF16", {"model.layers.0.mlp.gate_proj.weight": torch.zeros(2, 2)})
    with pytest.raises(MissingTensorError, match="no routed experts"):
        detect_method(path)


@pytest.mark.parametrize("content", ["{", "[]", "{}garbage"])
def test_damaged_config_json(tmp_path, content):
    path = _broken(tmp_path, "FP8", lambda tensors: None)
    (path / "config.json").write_text(content)
    assert "config.json" in _refused(path, "FP8") and "download it again" in _refused(path, "AUTO")


@pytest.mark.parametrize("method", QUANTISED)
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_infinite_weights_cannot_be_quantised(method, value):
    gate, up, down = random_experts(1, EXPERTS, HIDDEN, INTERMEDIATE)
    up[4, 3, 2] = value
    layer = make_layer(method)
    with pytest.raises(InputError, match=f"up_proj of expert 4 .* method {method}"):
        layer.load_weights_from_tensors(gate, up, down)


def test_refused_quantised_load_leaves_the_process_able_to_load(tmp_path):
    path = _broken(tmp_path, "MXFP4", _reshaped(_scale_of("MXFP4"), 1, 1))
    with pytest.raises(KTError):
        load("MXFP4", path)
    save(path, "MXFP4", checkpoint_tensors("MXFP4", quantised("MXFP4")))
    assert load("AUTO", path).method == "MXFP4"
