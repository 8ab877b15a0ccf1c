"""What a conversion must give, in numpy: knows nothing of the package, its kernels or torch.

Stored numbers as float32, the codes and scales they must become, and a reader of the files written.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np

NUMPY_DTYPES = {
    "I8": np.int8,
    "U8": np.uint8,
    "F32": np.float32,
    "I32": np.int32,
    "F16": np.float16,
}


def read_shard(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """(tensors by name, metadata); checks that the tensors fill the file without gaps."""
    octets = path.read_bytes()
    (length,) = struct.unpack("<Q", octets[:8])
    header = json.loads(octets[8 : 8 + length])
    metadata = header.pop("__metadata__")
    tensors, end = {}, 0
    for name, entry in header.items():
        begin, stop = entry["data_offsets"]
        assert begin == end, f"a gap before {name}"
        values = np.frombuffer(octets[8 + length + begin : 8 + length + stop], NUMPY_DTYPES[entry["dtype"]])
        tensors[name], end = values.reshape(entry["shape"]), stop
    assert 8 + length + end == len(octets)
    return tensors, metadata


def quantised(matrix: np.ndarray, bits: int, group: int) -> tuple[np.ndarray, np.ndarray]:
    """float32 [N, K] -> (codes as stored, scales [N, groups])."""
    largest = np.float32(127 if bits == 8 else 7)
    groups = matrix.astype(np.float32).reshape(matrix.shape[0], -1, group or matrix.shape[1])
    scales = np.abs(groups).max(axis=-1, keepdims=True) / largest
    codes = np.rint(groups / np.where(scales == 0, np.float32(1), scales)).reshape(matrix.shape)
    codes = np.clip(codes, -largest, largest).astype(np.int8)
    if bits == 8:
        return codes, scales[..., 0]
    nibbles = (codes + 8).astype(np.uint8)
    return nibbles[:, 0::2] | (nibbles[:, 1::2] << 4), scales[..., 0]


def decoded(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """A converted matrix as float32 [N, K]."""
    values = codes.astype(np.float32)
    if codes.dtype == np.uint8:
        values = (
            np.stack((codes & 15, codes >> 4), axis=-1).reshape(codes.shape[0], -1).astype(np.float32) - 8
        )
    return values * np.repeat(scales, values.shape[1] // scales.shape[1], axis=1)


def bf16(bits: np.ndarray) -> np.ndarray:
    """uint16 -> float32"""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def e4m3(codes: np.ndarray) -> np.ndarray:
    """uint8 -> float32: sign, 4 bits of exponent with bias 7, 3 of mantissa; 0x7F is NaN."""
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, code & 7
    values = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    values = np.where(code & 0x7F == 0x7F, np.nan, values) * np.where(code & 0x80, -1.0, 1.0)
    return values.astype(np.float32)[codes]


def blocks_of(scales: np.ndarray, shape: tuple[int, int], block: tuple[int, int]) -> np.ndarray:
    """One scale per block -> one per element."""
    wide = np.repeat(np.repeat(scales.astype(np.float32), block[0], 0), block[1], 1)
    return wide[: shape[0], : shape[1]]
