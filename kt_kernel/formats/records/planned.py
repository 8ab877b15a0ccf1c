"""Methods whose names the interface knows and that no build can read yet."""

from __future__ import annotations

from kt_kernel.formats.record import MethodRecord

AMXINT4 = MethodRecord(
    name="AMXINT4", weights="a directory made by scripts/convert_cpu_weights.py --quant-method int4"
)
AMXINT8 = MethodRecord(
    name="AMXINT8", weights="a directory made by scripts/convert_cpu_weights.py --quant-method int8"
)
MOE_INT4 = MethodRecord(
    name="MOE_INT4", weights="a directory made by scripts/convert_cpu_weights.py --quant-method moe_int4"
)
MOE_INT8 = MethodRecord(
    name="MOE_INT8", weights="a directory made by scripts/convert_cpu_weights.py --quant-method moe_int8"
)
LLAMAFILE = MethodRecord(
    name="LLAMAFILE", weights="GGUF files with any quantisation of ffn_{gate,up,down}_exps"
)
