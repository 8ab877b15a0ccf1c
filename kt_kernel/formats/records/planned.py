"""Methods whose names the interface knows and that no build can read yet."""

from __future__ import annotations

from kt_kernel.formats.record import MethodRecord

LLAMAFILE = MethodRecord(
    name="LLAMAFILE", weights="GGUF files with any quantisation of ffn_{gate,up,down}_exps"
)
