"""All weight methods, one record each, by name; a new method is a record here and a row in csrc/formats/."""

from __future__ import annotations

from kt_kernel.formats.record import MethodRecord
from kt_kernel.formats.records.bf16 import BF16
from kt_kernel.formats.records.code4 import GPTQ_INT4, MXFP4, NVFP4, RAWINT4
from kt_kernel.formats.records.float8 import FP8, FP8_PERCHANNEL, MXFP8
from kt_kernel.formats.records.integers import AMXINT4, AMXINT8, MOE_INT4, MOE_INT8
from kt_kernel.formats.records.llamafile import LLAMAFILE

_TABLE = (
    BF16,
    FP8,
    FP8_PERCHANNEL,
    RAWINT4,
    MXFP4,
    MXFP8,
    NVFP4,
    GPTQ_INT4,
    AMXINT4,
    AMXINT8,
    MOE_INT4,
    MOE_INT8,
    LLAMAFILE,
)

RECORDS: dict[str, MethodRecord] = {record.name: record for record in _TABLE}
