"""Methods of symmetric integers with float32 scales per group or row (csrc/formats/integers.h), as
scripts/convert_cpu_weights.py writes them."""

from __future__ import annotations

from dataclasses import replace

import torch

from kt_kernel.formats import values
from kt_kernel.formats.quantize.integers import to_int4, to_int8
from kt_kernel.formats.record import Encoding, MethodRecord, Storage
from kt_kernel.formats.shapes import per_group, plain, two_per_byte

AMXINT4 = MethodRecord(
    name="AMXINT4",
    weights="a directory made by scripts/convert_cpu_weights.py --quant-method int4",
    columns_multiple=2,
    storage=(
        Storage(
            weight="weight",
            weight_shapes={"U8": two_per_byte},
            scales=("weight_scale",),
            scale_dtypes=("F32",),
            scale_shape=per_group,
            group_axis=1,
        ),
    ),
    encoding=Encoding(codes=torch.uint8, columns_per_code=2, scales=torch.float32),
    decode=values.packed_int4,
    quantise=to_int4,
    usual_group_size=32,  # doc/accuracy.md
    largest_code=7.0,
)

AMXINT8 = MethodRecord(
    name="AMXINT8",
    weights="a directory made by scripts/convert_cpu_weights.py --quant-method int8",
    storage=(
        Storage(
            weight="weight",
            weight_shapes={"I8": plain},
            scales=("weight_scale",),
            scale_dtypes=("F32",),
            scale_shape=per_group,
            group_axis=1,
        ),
    ),
    encoding=Encoding(codes=torch.int8, scales=torch.float32),
    decode=values.int8,
    quantise=to_int8,
    largest_code=127.0,
)

# Other names of the same, which the original converter gives to files for CPUs without AMX.
MOE_INT4 = replace(
    AMXINT4,
    name="MOE_INT4",
    weights="a directory made by scripts/convert_cpu_weights.py --quant-method moe_int4",
    stored_as="AMXINT4",
)
MOE_INT8 = replace(
    AMXINT8,
    name="MOE_INT8",
    weights="a directory made by scripts/convert_cpu_weights.py --quant-method moe_int8",
    stored_as="AMXINT8",
)
