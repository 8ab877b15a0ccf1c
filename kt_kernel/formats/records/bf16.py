"""bfloat16: the numbers themselves (csrc/formats/bf16.h)."""

from __future__ import annotations

import torch

from kt_kernel.formats.record import Encoding, MethodRecord, Storage
from kt_kernel.formats.shapes import plain

BF16 = MethodRecord(
    name="BF16",
    weights="safetensors with bfloat16 experts",
    storage=(Storage(weight="weight", weight_shapes={"BF16": plain}),),
    encoding=Encoding(codes=torch.bfloat16),
    decode=lambda codes, scales: codes,
)
