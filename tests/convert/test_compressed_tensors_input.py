"""Risk: codes with zero points or reordered columns are decoded in another way than by their own package.

compressed-tensors quantises, packs and decodes; the converted files hold the codes of what it decodes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import Stored, write_checkpoint
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from test_converted_numbers import assert_quantised, converted

GROUP = 64


def maker(*, symmetric: bool, reordered: bool):
    args = QuantizationArgs(
        num_bits=4,
        type="int",
        symmetric=symmetric,
        strategy="group",
        group_size=GROUP,
        actorder="group" if reordered else None,
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")

    def make(random: np.random.Generator, n: int, k: int) -> Stored:
        matrix = torch.from_numpy(random.normal(0.01, 0.02, (n, k)).astype(np.float32))
        groups = matrix.unflatten(1, (-1, GROUP))
        scales, zeros = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
        state = {"weight": matrix, "weight_scale": scales, "weight_zero_point": zeros.to(torch.int8)}
        if reordered:
            order = random.permutation(np.arange(k) // GROUP)
            state["weight_g_idx"] = torch.from_numpy(order.astype(np.int32))
        tensors = compressor.compress(state, scheme)
        return Stored(tensors, compressor.decompress(dict(tensors), scheme)["weight"].numpy())

    return make


@pytest.mark.parametrize(("symmetric", "reordered"), [(False, False), (True, True), (False, True)])
def test_codes_are_the_nearest_of_what_their_package_decodes(tmp_path: Path, symmetric, reordered):
    numbers = write_checkpoint(tmp_path / "in", maker(symmetric=symmetric, reordered=reordered))
    tensors = converted(tmp_path / "in", tmp_path / "out", "int8", 0)
    assert_quantised(tensors, numbers, 8, 0)
