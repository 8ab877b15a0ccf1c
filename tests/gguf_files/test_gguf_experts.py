"""Layers loaded from GGUF compute with the numbers of the file, or say in a sentence why they cannot."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from gguf_layers import (
    EXPERTS,
    HIDDEN,
    INTERMEDIATE,
    NMSE_BOUNDS,
    error_of,
    fused,
    one_by_one,
    random_layer,
    random_matrices,
    stacked,
    stored,
    wrapper,
    write_model,
)
from safetensors.torch import save_file

from kt_kernel import KTMoEWrapper, detect_method, kt_kernel_ext
from kt_kernel.adapters.attach import attach
from kt_kernel.adapters.backend import ExpertLora
from kt_kernel.errors import (
    CheckpointError,
    ConfigurationError,
    FeatureUnavailableError,
    InputError,
    MissingTensorError,
)
from kt_kernel.formats import methods
from kt_kernel.formats.quantize.q8_0 import to_q8_0
from kt_kernel.integrations.options import ExpertOptions
from kt_kernel.moe import open_experts

FORMATS = [row["name"] for row in kt_kernel_ext.FORMATS if row["method"] == "LLAMAFILE"]
WITH_INT8 = dict.fromkeys(
    row["format"]
    for row in kt_kernel_ext.dispatch_table()
    if row["method"] == "LLAMAFILE" and row["activations"] == "int8"
)
STORAGES = ("packed", "mapped")


def _check(path, layer, activations="auto", **changes):
    made = wrapper(path, activations=activations, **changes)
    made.load_weights()
    assert error_of(made, layer.numbers) <= NMSE_BOUNDS[activations]


def _refused(path, error=CheckpointError, **changes) -> str:
    with pytest.raises(error) as caught:
        wrapper(path, **changes).load_weights()
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---- what is read ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_every_type_is_computed_with_as_the_file_means_it(tmp_path, name):
    layer = random_layer(name, name, name)
    path = write_model(tmp_path / "model.gguf", stacked("blk.0", layer))
    _check(path, layer, "bf16")
    _check(path, layer, "bf16", weight_storage="mapped")
    if name in WITH_INT8:
        _check(path, layer, "int8")


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize(
    "types", [("Q4_K", "Q4_K", "Q6_K"), ("Q2_K", "Q5_1", "F16"), ("IQ2_XXS", "IQ3_S", "Q8_0")]
)
def test_each_matrix_and_each_layer_may_have_another_type(tmp_path, types, storage):
    layers = [random_layer(*types), random_layer(*types[::-1], seed=2)]
    tensors = [*stacked("blk.0", layers[0]), *stacked("blk.1", layers[1])]
    path = write_model(tmp_path / "model.gguf", tensors)
    for number, layer in enumerate(layers):
        _check(path, layer, layer_idx=number, weight_storage=storage)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("form", [fused, one_by_one])
def test_gate_and_up_in_one_tensor_and_a_tensor_for_each_expert(tmp_path, form, storage):
    layer = random_layer("Q4_K", "Q4_K", "Q6_K")
    _check(
        write_model(tmp_path / "model.gguf", form("blk.3", layer)), layer, layer_idx=3, weight_storage=storage
    )


@pytest.mark.parametrize("storage", STORAGES)
def test_map_puts_experts_of_the_file_into_slots(tmp_path, storage):
    layer, order = random_layer("Q4_0", "Q5_0", "Q8_0"), torch.tensor([2, 0, 3, 1])
    path = write_model(tmp_path / "model.gguf", stacked("blk.0", layer))
    made = wrapper(path, weight_storage=storage)
    made.load_weights(order)
    assert error_of(made, tuple(matrices[order] for matrices in layer.numbers)) <= NMSE_BOUNDS["auto"]


@pytest.mark.parametrize("storage", STORAGES)
def test_a_lora_is_added_to_what_the_file_means(tmp_path, storage):
    layer = random_layer("Q4_K", "Q4_K", "Q6_K")
    made = wrapper(
        write_model(tmp_path / "model.gguf", stacked("blk.0", layer)),
        activations="bf16",
        weight_storage=storage,
    )
    made.load_weights()
    generator = torch.Generator().manual_seed(1)

    def pair(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        sizes = (EXPERTS, 4, columns), (EXPERTS, rows, 4)
        return tuple(torch.randn(size, generator=generator) / size[-1] ** 0.5 for size in sizes)

    pairs = pair(INTERMEDIATE, HIDDEN), pair(INTERMEDIATE, HIDDEN), pair(HIDDEN, INTERMEDIATE)
    attach(made, ExpertLora.of([matrix for each in pairs for matrix in each], 2.0))
    merged = tuple(w + 2.0 * (b @ a).to(w) for w, (a, b) in zip(layer.numbers, pairs, strict=True))
    assert error_of(made, merged) <= NMSE_BOUNDS["bf16"]
    assert error_of(made, layer.numbers) > 0.01


def test_auto_takes_gguf_by_file_and_by_directory(tmp_path):
    layer = random_layer("Q8_0", "Q8_0", "Q8_0")
    path = write_model(tmp_path / "model.gguf", stacked("blk.0", layer))
    for place in (path, tmp_path):
        assert detect_method(place) == "LLAMAFILE"
        assert ExpertOptions(weight_path=place).weight_method() == "LLAMAFILE"
        _check(place, layer, method="AUTO")


def test_beside_safetensors_the_method_decides(tmp_path):
    layer = random_layer("Q8_0", "Q8_0", "Q8_0")
    write_model(tmp_path / "model.gguf", stacked("blk.0", layer))
    names = ("gate_proj", "up_proj", "down_proj")
    save_file(
        {
            f"model.layers.0.mlp.experts.{expert}.{name}.weight": matrices[expert].bfloat16()
            for name, matrices in zip(names, layer.numbers, strict=True)
            for expert in range(EXPERTS)
        },
        tmp_path / "model.safetensors",
    )
    assert detect_method(tmp_path) == "BF16"
    assert ExpertOptions(weight_path=tmp_path, method="LLAMAFILE").weight_method() == "LLAMAFILE"
    _check(tmp_path, layer)


def test_bytes_of_layers_are_counted(tmp_path):
    layer = random_layer("Q8_0", "Q8_0", "Q4_0")
    more = stored("token_embd.weight", "Q8_0", np.zeros((3, 34), np.uint8), 32)
    source = open_experts(write_model(tmp_path / "model.gguf", [*stacked("blk.1", layer), more]))
    expected = EXPERTS * HIDDEN * INTERMEDIATE // 32 * (34 + 34 + 18)
    assert source.layer_bytes() == {1: expected}
    assert source.expert_bytes() == expected
    assert source.stored_bytes() == expected + 102
    assert source.draft_method(1) == "LLAMAFILE" and source.draft_method(2) is None


def _as_q8_0(matrix: torch.Tensor) -> torch.Tensor:
    numbers = dequantize(to_q8_0(matrix.float(), 0).weight.numpy(), GGMLQuantizationType.Q8_0)
    return torch.from_numpy(numbers).double()


def test_tensors_become_q8_0(tmp_path):
    random = torch.Generator().manual_seed(3)
    shapes = ((EXPERTS, INTERMEDIATE, HIDDEN),) * 2 + ((EXPERTS, HIDDEN, INTERMEDIATE),)
    experts = tuple((torch.randn(shape, generator=random) / 16).bfloat16() for shape in shapes)
    made = wrapper(tmp_path)
    made.load_weights_from_tensors(*experts)
    decoded = tuple(torch.stack([_as_q8_0(matrix) for matrix in matrices]) for matrices in experts)
    assert error_of(made, decoded) <= NMSE_BOUNDS["auto"]
    for numbers, matrices in zip(decoded, experts, strict=True):
        assert (numbers - matrices.double()).square().sum() < 1e-4 * matrices.double().square().sum()
    odd = (torch.zeros(EXPERTS, 8, 40), torch.zeros(EXPERTS, 8, 40), torch.zeros(EXPERTS, 40, 8))
    with pytest.raises(InputError, match="40 columns, but Q8_0 needs a multiple of 32"):
        wrapper("", hidden_size=40, moe_intermediate_size=8).load_weights_from_tensors(*odd)


# ---- memory ----------------------------------------------------------------------------------------------


def _resident(path: Path) -> int:
    """Bytes of the file's mapping that this process holds in memory."""
    resident, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ", 1)[0]:
            inside = str(path) in line
        elif inside and line.startswith("Rss:"):
            resident += int(line.split()[1]) * 1024
    return resident


def test_pages_of_the_file_are_given_back_after_each_layer(tmp_path):
    layer = random_layer("Q8_0", "Q8_0", "Q8_0", hidden=2048, intermediate=512)  # 13 MB
    path = write_model(tmp_path / "model.gguf", stacked("blk.0", layer))
    made = wrapper(path, hidden_size=2048, moe_intermediate_size=512)
    made.load_weights()
    assert _resident(path) < 1_000_000
    assert error_of(made, layer.numbers) <= NMSE_BOUNDS["auto"]
    assert _resident(path) < 1_000_000


def test_a_mapped_layer_reads_the_file_and_keeps_it(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(methods, "_announced", set())
    caplog.set_level("INFO", "kt_kernel.formats.methods")
    layer = random_layer("Q8_0", "Q8_0", "Q8_0", hidden=2048, intermediate=512)
    path = write_model(tmp_path / "model.gguf", stacked("blk.0", layer))
    made = wrapper(path, hidden_size=2048, moe_intermediate_size=512, weight_storage="mapped")
    made.load_weights()
    assert ["blocks." in record.message and "mapped file" in record.message for record in caplog.records] == [
        True
    ]
    assert _resident(path) < 1_000_000
    KTMoEWrapper.force_release_loader()
    path.unlink()
    assert error_of(made, layer.numbers) <= NMSE_BOUNDS["auto"]


# ---- what is refused -------------------------------------------------------------------------------------


def test_a_missing_layer_and_a_model_without_experts(tmp_path):
    layer = random_layer("Q8_0", "Q8_0", "Q8_0")
    tensors = [tensor for number in (1, 2, 3, 7) for tensor in stacked(f"blk.{number}", layer)]
    path = write_model(tmp_path / "model.gguf", tensors)
    assert "which has them in layers 1-3, 7" in _refused(path, MissingTensorError)
    dense = stored("blk.0.ffn_up.weight", "Q8_0", np.zeros((2, 34), np.uint8), 32)
    path = write_model(tmp_path / "dense.gguf", [dense])
    assert "has no routed experts" in _refused(path, MissingTensorError)
    with pytest.raises(MissingTensorError, match="has no routed experts"):
        detect_method(path)


@pytest.mark.parametrize("absent", [0, 1, 2])
def test_a_missing_matrix(tmp_path, absent):
    tensors = stacked("blk.0", random_layer("Q8_0", "Q8_0", "Q8_0"))
    name = tensors.pop(absent).name
    assert f"tensor '{name}' is not in" in _refused(write_model(tmp_path / "model.gguf", tensors))


@pytest.mark.parametrize(
    ("changes", "seen"),
    [
        ({"num_experts": EXPERTS + 1}, f"num_experts is {EXPERTS + 1}, but"),
        ({"hidden_size": 256}, f"has shape [{EXPERTS}, {INTERMEDIATE}, {HIDDEN}], expected"),
        ({"moe_intermediate_size": 512}, "expected [4, 512, 512] from the model's description"),
        ({"method": "FP8"}, "method FP8 was asked for, but"),
    ],
)
@pytest.mark.parametrize("form", [stacked, one_by_one])
def test_another_model_than_described(tmp_path, form, changes, seen):
    path = write_model(tmp_path / "model.gguf", form("blk.0", random_layer("Q8_0", "Q8_0", "Q8_0")))
    message = _refused(path, **changes)
    assert seen in message or (form is one_by_one and "has shape" in message)


def test_experts_of_one_projection_must_have_one_type(tmp_path):
    layer = random_layer("Q8_0", "Q8_0", "Q8_0")
    other = one_by_one("blk.0", random_layer("Q8_0", "Q4_0", "Q8_0"))
    mixed = [
        other[place] if tensor.name == "blk.0.ffn_up.2.weight" else tensor
        for place, tensor in enumerate(one_by_one("blk.0", layer))
    ]
    message = _refused(write_model(tmp_path / "model.gguf", mixed))
    assert "tensor 'blk.0.ffn_up.2.weight' in" in message and "is Q4_0, expected Q8_0 as" in message


@pytest.mark.parametrize("form", [stacked, one_by_one])
def test_a_factor_is_refused_unless_it_changes_nothing(tmp_path, form):
    layer = random_layer("Q8_0", "Q8_0", "Q8_0")
    tensors = form("blk.0", layer)
    name = tensors[0].name.replace("weight", "scale")
    for value in (1, 1.5):
        numbers = np.full((EXPERTS, 2), value, np.float32)
        extra = stored(name, "F32", numbers.view(np.uint8), 2)
        path = write_model(tmp_path / f"{value}.gguf", [*tensors, extra])
        if value == 1:
            _check(path, layer)
        else:
            assert f"tensor '{name}' in '{path}' holds a factor" in _refused(path)


@pytest.mark.parametrize(
    ("form", "name", "shape"),
    [
        (fused, "ffn_gate_exps.bias", (EXPERTS, INTERMEDIATE)),
        (stacked, "ffn_gate_up_exps.bias", (EXPERTS, 2 * INTERMEDIATE)),
        (stacked, "ffn_down.0.bias", (HIDDEN,)),
        (one_by_one, "ffn_down_exps.bias", (EXPERTS, HIDDEN)),
    ],
)
def test_a_bias_stored_otherwise_than_its_matrix_is_not_lost(tmp_path, form, name, shape):
    tensors = form("blk.0", random_layer("Q8_0", "Q8_0", "Q8_0"))
    bias = stored(f"blk.0.{name}", "F32", np.ones(shape, np.float32).view(np.uint8), shape[-1])
    message = _refused(write_model(tmp_path / "model.gguf", [*tensors, bias]))
    assert f"tensor 'blk.0.{name}' in" in message and "is a bias without the matrix" in message


def test_a_type_without_kernels_is_named(tmp_path):
    layer = random_layer("Q8_0", "Q8_0", "Q8_0")
    columns = np.zeros((EXPERTS, INTERMEDIATE, HIDDEN), np.int8)
    tensors = [stored("blk.0.ffn_gate_exps.weight", "I8", columns.view(np.uint8), HIDDEN)]
    message = _refused(write_model(tmp_path / "model.gguf", tensors + stacked("blk.0", layer)[1:]))
    assert "is I8, but experts are read from" in message and "Q4_K" in message


@pytest.mark.parametrize(
    ("changes", "error", "seen"),
    [
        ({"method": "BF16"}, ConfigurationError, "method BF16 packs them, only LLAMAFILE can do without"),
        ({"activations": "int8"}, ConfigurationError, "no kernel multiplies with int8 activations"),
        ({"weight_storage": "disk"}, ConfigurationError, "weight_storage is 'disk', expected one of packed"),
    ],
)
def test_mapping_what_cannot_be_mapped(changes, error, seen):
    with pytest.raises(error, match=seen):
        wrapper("", **{"weight_storage": "mapped", **changes})


def test_tensors_cannot_be_mapped():
    made, empty = wrapper("", weight_storage="mapped"), torch.zeros(1)
    with pytest.raises(FeatureUnavailableError, match="cannot be mapped from a file"):
        made.load_weights_from_tensors(empty, empty, empty)


def test_mapping_is_spelled_as_the_user_did(tmp_path):
    save_file(
        {"model.layers.0.mlp.experts.0.up_proj.weight": torch.zeros(2, 2).bfloat16()},
        tmp_path / "a.safetensors",
    )
    with pytest.raises(ConfigurationError, match=r"^gguf_mmap asks for weights in their mapped file"):
        ExpertOptions(weight_path=tmp_path, gguf_mmap=True).weight_method()


def test_saving_what_was_quantised_here_is_refused(tmp_path):
    with pytest.raises(FeatureUnavailableError, match="cpu_save is not available for method LLAMAFILE"):
        wrapper(tmp_path, cpu_save=True)


def test_a_damaged_scale_names_the_tensor(tmp_path):
    layer = random_layer("Q8_0", "Q8_0", "Q8_0")
    damaged = layer.up.stored.copy()
    damaged[1, 3, :2] = 0xFF  # NaN
    broken = dataclasses.replace(layer, up=dataclasses.replace(layer.up, stored=damaged))
    made = wrapper(write_model(tmp_path / "model.gguf", stacked("blk.0", broken)))
    made.load_weights()
    hidden, ids = torch.ones(1, HIDDEN).bfloat16(), torch.tensor([[1, 0]])
    assert made.forward(hidden, ids, torch.ones(1, 2)).isnan().any()  # as for NaN in other formats


def test_random_layers_are_not_all_zeros_or_huge():
    for name in FORMATS:
        numbers = random_matrices(name, 32, 512, seed=1).numbers
        assert 1e-4 < numbers.abs().mean() < 4, name
