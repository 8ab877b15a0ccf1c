"""The records of methods in Python and the rows of formats in C++ say the same of every method."""

import pytest
import torch

from kt_kernel import kt_kernel_ext
from kt_kernel.checkpoint.safetensors_file import TORCH_DTYPES
from kt_kernel.formats.records import RECORDS
from kt_kernel.gguf.types import TYPES_BY_NAME

# Of methods that have but one format; those of GGUF files are ggml's types.
ROWS = {row["method"]: row for row in kt_kernel_ext.FORMATS if row["name"] == row["method"]}

_CODES = {"bf16": torch.bfloat16, "e4m3": torch.float8_e4m3fn, "int8": torch.int8}
_COLUMNS = {"row": 0, "group size": None}
_WRITTEN = {
    "scalar": torch.float32,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "e8m0": torch.uint8,
    "e4m3": torch.float8_e4m3fn,
    "as stored": None,
}


def test_every_method_that_can_be_read_has_both():
    assert set(ROWS) == {name for name, record in RECORDS.items() if record.storage}
    assert set(kt_kernel_ext.METHODS) <= {*ROWS, "LLAMAFILE"}


def test_types_of_gguf_files_are_as_large_to_the_reader_as_to_the_extension():
    rows = {row["name"]: (row["id"], row["columns"], row["bytes"]) for row in kt_kernel_ext.GGUF_TYPES}
    ours = {name: (row.id, row.columns, row.bytes) for name, row in TYPES_BY_NAME.items() if name in rows}
    assert ours == rows
    assert {row["name"] for row in kt_kernel_ext.FORMATS if row["method"] == "LLAMAFILE"} <= set(rows)


@pytest.mark.parametrize("method", ROWS)
def test_codes_and_their_order_are_the_same(method):
    row, encoding = ROWS[method], RECORDS[method].encoding
    assert encoding.transposed == (row["order"] == "transposed")
    assert encoding.columns_per_code == row["columns_per_word"]
    assert encoding.codes.itemsize * 8 == row["bits"] * row["columns_per_word"]
    assert row["bits"] == 4 or encoding.codes is _CODES[row["codes"]]


@pytest.mark.parametrize("method", ROWS)
def test_scales_and_what_shares_one_are_the_same(method):
    row, encoding = ROWS[method], RECORDS[method].encoding
    if row["rows_per_scale"] is None:
        assert encoding.scales is None and not encoding.scales_of_checkpoint
        return
    assert encoding.rows_per_scale == row["rows_per_scale"]
    assert encoding.columns_per_scale == _COLUMNS.get(row["columns_per_scale"], row["columns_per_scale"])
    written = row["scale"] if row["written_scale"] == "as kept" else row["written_scale"]
    assert encoding.scales is _WRITTEN[written]
    assert encoding.scales_of_checkpoint == (written == "as stored")


@pytest.mark.parametrize("method", [name for name, row in ROWS.items() if row["table"] is not None])
def test_a_four_bit_code_is_the_same_number(method):
    """Sixteen columns of one row hold every code once."""
    record, table = RECORDS[method], ROWS[method]["table"]
    pairs = torch.tensor([code | (code + 1) << 4 for code in range(0, 16, 2)], dtype=torch.uint8)
    words = pairs.repeat(2)[None].view(record.encoding.codes)  # 32 columns: a group of MXFP4
    scales = torch.ones(1, 32 // (record.encoding.columns_per_scale or 32))
    codes = words.t() if record.encoding.transposed else words
    scales = scales.t() if record.encoding.transposed else scales
    assert record.decode(codes, scales)[0, :16].tolist() == list(table)
    largest = record.largest_code / (448 if record.encoding.global_scales else 1)
    assert largest == max(table)


@pytest.mark.parametrize("method", [name for name in ROWS if RECORDS[name].quantise is not None])
def test_quantised_matrices_have_the_dtypes_of_a_checkpoint(method):
    record = RECORDS[method]
    made = record.quantise(torch.randn(128, 256), record.usual_group_size)
    stored = record.storage[0]
    assert made.weight.dtype in [TORCH_DTYPES[name] for name in stored.weight_shapes]
    assert made.scale.dtype in [TORCH_DTYPES[name] for name in stored.scale_dtypes]
    name = next(name for name in stored.weight_shapes if TORCH_DTYPES[name] is made.weight.dtype)
    assert tuple(made.weight.shape) in stored.weight_shapes[name](128, 256, record.usual_group_size)
    assert tuple(made.scale.shape) in stored.scale_shape(128, 256, record.usual_group_size)
