"""The files of this folder are what the tests that read them take them for."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGUFReader
from gguf.quants import dequantize

from kt_kernel.demo.experts import NUM_EXPERTS
from kt_kernel.demo.gguf_source import find_source


def decoded(file: GGUFReader, part: str) -> dict[str, np.ndarray]:
    """The numbers of all tensors with `part` in their name."""
    tensors = (tensor for tensor in file.tensors if part in tensor.name)
    return {tensor.name: dequantize(tensor.data, tensor.tensor_type) for tensor in tensors}


# Error of a type as the square of its deviation from normally distributed weights, about twice what it has.
MOST_NMSE = {
    "Q8_0": 7e-5,
    "Q6_K": 7e-4,
    "Q5_K": 3e-3,
    "Q4_K": 1.2e-2,
    "IQ4_XS": 1.3e-2,
    "MXFP4": 3e-2,
    "Q3_K": 5e-2,
    "IQ3_XXS": 7e-2,
    "Q2_K": 0.16,
}


@pytest.mark.parametrize("kind", ["Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0", "IQ4_XS", "IQ3_XXS", "Q2_K", "MXFP4"])
def test_another_projects_blocks_mean_the_weights_they_were_made_from(kind, tiny_gguf, quantised_gguf):
    source = decoded(GGUFReader(tiny_gguf("TINY")), "blk.0.ffn")
    file = GGUFReader(quantised_gguf("TINY", kind))
    types = {tensor.name: tensor.tensor_type.name for tensor in file.tensors if "_exps" in tensor.name}
    for name, values in decoded(file, "blk.0.ffn").items():
        if name not in types:
            continue
        nmse = np.square(values - source[name]).mean() / np.square(source[name]).mean()
        assert 0 < nmse < MOST_NMSE[types[name]], (name, types[name], nmse)
    assert kind.removesuffix("_M") in types.values()


def test_demo_experts_are_the_dense_matrices_cut(demo_gguf):
    cut, source = GGUFReader(demo_gguf), GGUFReader(find_source().path)
    for layer in ("blk.0.", "blk.17.", "blk.29."):
        file, dense = decoded(cut, f"{layer}ffn"), decoded(source, f"{layer}ffn")
        for part in ("gate", "up"):
            experts = file[f"{layer}ffn_{part}_exps.weight"]
            assert np.array_equal(np.concatenate(experts, axis=0), dense[f"{layer}ffn_{part}.weight"])
        down = np.concatenate(file[f"{layer}ffn_down_exps.weight"], axis=1)
        assert np.array_equal(down, NUM_EXPERTS * dense[f"{layer}ffn_down.weight"])
        assert not file[f"{layer}ffn_gate_inp.weight"].any()
