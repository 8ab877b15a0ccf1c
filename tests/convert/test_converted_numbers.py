"""Risk: a converted weight is not the nearest code of the original number: rounded twice, of another expert
or projection, with another group's scale, decoded in another way than its format says.

Everything is compared exactly with numpy's arithmetic in float32.
"""

from __future__ import annotations

import json
from pathlib import Path

import checkpoints
import numpy as np
import pytest
import torch
from checkpoints import FAMILIES, write_checkpoint, write_packed
from yardstick import quantised, read_shard

from kt_kernel.convert.job import Conversion, convert
from kt_kernel.convert.targets import target
from kt_kernel.formats.quantize.integers import to_int4, to_int8


def converted(source: Path, output: Path, method: str, group_size: int) -> dict[str, np.ndarray]:
    convert(Conversion(source, output, target(method, group_size), threads=2), progress=lambda _: Silent())
    index = json.loads((output / "model.safetensors.index.json").read_text())["weight_map"]
    tensors = {}
    for name in sorted(set(index.values())):
        tensors |= read_shard(output / name)[0]
    assert set(tensors) == set(index)
    return tensors


class Silent:
    def layer(self, text: str) -> None: ...
    def add(self, input_bytes: int) -> None: ...
    def end(self) -> None: ...


def assert_quantised(
    tensors: dict[str, np.ndarray], numbers: dict[str, np.ndarray], bits: int, group: int
) -> None:
    assert {name.rpartition(".")[0] for name in tensors} == set(numbers)
    for name, matrix in numbers.items():
        codes, scales = quantised(matrix, bits, group)
        np.testing.assert_array_equal(tensors[f"{name}.weight_scale"], scales, err_msg=name)
        np.testing.assert_array_equal(tensors[f"{name}.weight"], codes, err_msg=name)


@pytest.mark.parametrize(("method", "bits", "group"), [("int8", 8, 0), ("int8", 8, 128), ("int4", 4, 32)])
@pytest.mark.parametrize("kind", checkpoints.FORMATS)
def test_codes_are_the_nearest_of_the_stored_numbers(tmp_path, kind, method, bits, group):
    numbers = checkpoints.write_format(tmp_path / "in", kind)
    assert_quantised(converted(tmp_path / "in", tmp_path / "out", method, group), numbers, bits, group)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_naming_is_found_and_written_alike(tmp_path, family):
    numbers = write_checkpoint(tmp_path / "in", checkpoints.stored_bf16, family=family)
    assert_quantised(converted(tmp_path / "in", tmp_path / "out", "int8", 64), numbers, 8, 64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("inputs_are_rows", [False, True])
def test_packed_experts_are_taken_apart(tmp_path, dtype, inputs_are_rows):
    numbers = write_packed(tmp_path / "in", dtype, inputs_are_rows=inputs_are_rows)
    assert_quantised(converted(tmp_path / "in", tmp_path / "out", "int4", 0), numbers, 4, 0)


def _quantise(values: torch.Tensor, bits: int, group: int) -> tuple[int, np.ndarray, np.ndarray]:
    from kt_kernel import kt_kernel_ext

    rows, columns = values.shape
    codes = np.full((rows, columns * bits // 8), 99, np.int8 if bits == 8 else np.uint8)
    scales = np.full((rows, columns // (group or columns)), np.nan, np.float32)
    dtype = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[values.dtype]
    wrong = kt_kernel_ext.quantise_rows(
        dtype,
        values.data_ptr(),
        rows,
        columns,
        None,
        bits,
        group or columns,
        codes.ctypes.data,
        scales.ctypes.data,
    )
    return wrong, codes, scales


@pytest.mark.parametrize(
    ("narrow", "method", "group"), [(384, "int4", 32), (96, "int4", 32), (48, "int4", 0), (96, "int8", 0)]
)
def test_the_usual_group_size_gives_way_to_narrow_matrices(narrow, method, group):
    assert target(method).fitted({"hidden": 256, "intermediate": narrow}).group_size == group


@pytest.mark.parametrize(("bits", "group"), [(4, 0), (4, 32), (8, 0), (8, 64)])
def test_a_converted_file_holds_what_loading_the_original_makes(bits, group):
    """The quantiser for models in memory, in torch, and the converter's kernel: the same bits."""
    values = torch.randn(70, 320, generator=torch.Generator().manual_seed(bits)).bfloat16()
    ours = (to_int8 if bits == 8 else to_int4)(values.float(), group)
    _, codes, scales = _quantise(values, bits, group)
    np.testing.assert_array_equal(codes, ours.weight.numpy())
    np.testing.assert_array_equal(scales, ours.scale.numpy())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [2, 6, 30, 34, 40, 62, 96, 258])
def test_whole_rows_of_any_length_end_where_they_should(bits, columns):
    values = torch.randn(5, columns, generator=torch.Generator().manual_seed(columns))
    wrong, codes, scales = _quantise(values, bits, 0)
    expected = quantised(values.numpy(), bits, 0)
    assert wrong == -1
    np.testing.assert_array_equal(codes, expected[0])
    np.testing.assert_array_equal(scales, expected[1])


@pytest.mark.parametrize("bits", [4, 8])
def test_ties_zeros_and_extreme_numbers_round_as_defined(bits):
    """Exact halves between codes, groups of zeros, numbers whose scale is subnormal or near the largest."""
    largest = 127 if bits == 8 else 7
    halves = (torch.arange(32.0) - 16.5).clamp(-largest, largest)
    rows = [torch.cat((torch.tensor([float(largest)]), halves[1:])), torch.zeros(32), -torch.zeros(32)]
    rows += [torch.linspace(-1, 1, 32) * scale for scale in (1e-44, 1e-42, 1e-39, 1e-37, 3e38)]
    values = torch.stack(rows)
    wrong, codes, scales = _quantise(values, bits, 32)
    expected = quantised(values.numpy(), bits, 32)
    assert wrong == -1
    np.testing.assert_array_equal(scales, expected[1])
    np.testing.assert_array_equal(codes, expected[0])


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_number_that_is_not_finite_is_seen_in_every_column(dtype, wrong):
    for column in range(38):
        values = torch.ones(4, 38, dtype=dtype)
        values[2, column] = wrong
        assert _quantise(values, 8, 0)[0] == 2
