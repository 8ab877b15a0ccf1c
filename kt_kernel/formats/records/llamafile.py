"""GGUF files (kt_kernel/gguf/): a matrix of any ggml type, whose blocks hold codes and scales together."""

from __future__ import annotations

import torch

from kt_kernel.formats.quantize.q8_0 import to_q8_0
from kt_kernel.formats.record import Encoding, MethodRecord

LLAMAFILE = MethodRecord(
    name="LLAMAFILE",
    weights="a GGUF file, any part of a split one, or the directory with it",
    encoding=Encoding(codes=torch.bfloat16),  # devices have no kernels for these blocks: decoded when written
    decode=lambda numbers, scales: numbers,
    quantise=to_q8_0,
    quantised_format="Q8_0",
    computes_from_files=True,
    largest_code=127.0,
)
