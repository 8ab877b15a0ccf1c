"""Several processes have parts of the experts: together they must compute what one computes, once."""

from itertools import pairwise

import pytest
import torch
from api_support import nmse, random_call, random_experts
from format_support import EXPERTS, METHODS, make_layer

from kt_kernel.cpu_share import CpuShare
from kt_kernel.errors import ConfigurationError
from kt_kernel.formats.cut import cut, unit_of
from kt_kernel.formats.expert_image import ExpertTensors
from kt_kernel.formats.matrices import ExpertMatrix, LayerExperts

# The last block of 128 is ragged, as the last groups would be if they were not cut finer.
HIDDEN, INTERMEDIATE = 256, 320

# Outputs in float32: the parts' sums, each in the order of the whole's, are added in another order only. In
# bfloat16 each part is rounded once more.
_NMSE_OF_ORDER = 1e-11


def _edges(method: str) -> tuple[int, ...]:
    return (0, 128, INTERMEDIATE) if unit_of(method) == 128 else (0, 96, 224, INTERMEDIATE)


def _layer(method: str, begin: int = 0, end: int = INTERMEDIATE, seed: int = 5, **changes):
    layer = make_layer(
        method,
        hidden_size=HIDDEN,
        moe_intermediate_size=INTERMEDIATE,
        share=CpuShare(begin, end, INTERMEDIATE),
        **changes,
    )
    layer.load_weights_from_tensors(*random_experts(seed, EXPERTS, HIDDEN, INTERMEDIATE))
    return layer


CASES = [
    *((method, "bf16") for method in (*METHODS, "LLAMAFILE")),
    *((method, "int8") for method in ("RAWINT4", "NVFP4", "LLAMAFILE")),
]


@pytest.mark.parametrize(("method", "activations"), CASES)
def test_the_shares_add_up_to_the_whole(method, activations):
    call = random_call(2, 7, torch.float32, EXPERTS, HIDDEN)
    whole = _layer(method, activations=activations)
    parts = [_layer(method, *edges, activations=activations) for edges in pairwise(_edges(method))]
    total = torch.stack([part.forward(*call) for part in parts]).sum(0)
    assert nmse(total, whole.forward(*call).double()) <= _NMSE_OF_ORDER
    bytes_of_parts = sum(part.moe.weight_bytes for part in parts)
    assert bytes_of_parts <= 1.35 * whole.moe.weight_bytes  # panels of 32 rows, blocks of 64 columns
    assert all(part.moe.weight_bytes < whole.moe.weight_bytes for part in parts)


@pytest.mark.parametrize("method", ["BF16", "FP8", "RAWINT4", "NVFP4", "GPTQ_INT4", "MXFP4"])
def test_a_share_is_written_as_the_shard_of_its_device(method):
    """With half of the rows each, a rank's own experts are what its device takes."""
    size = 512
    whole = make_layer(method, hidden_size=HIDDEN, moe_intermediate_size=size)
    experts = random_experts(6, EXPERTS, HIDDEN, size)
    whole.load_weights_from_tensors(*experts)
    shards = whole.encoding(2)
    expected = [_empty(shards) for _ in range(2)]
    whole.write_expert(3, expected)
    for rank in range(2):
        mine = make_layer(
            method,
            hidden_size=HIDDEN,
            moe_intermediate_size=size,
            share=CpuShare(rank * size // 2, (rank + 1) * size // 2, size),
        )
        mine.load_weights_from_tensors(*experts)
        encoding = mine.encoding(1)
        assert encoding.spans == shards.spans and encoding.scale_group == shards.scale_group
        written = _empty(encoding)
        mine.write_expert(3, [written])
        for part, other in zip(written, expected[rank], strict=True):
            assert (part is None) == (other is None)
            assert part is None or torch.equal(part.view(torch.uint8), other.view(torch.uint8))


def _empty(encoding) -> ExpertTensors:
    return encoding.views(torch.zeros(encoding.bytes, dtype=torch.uint8))


def test_biases_of_down_are_added_once_and_those_of_gate_where_their_rows_are():
    def matrix(rows, columns):
        return ExpertMatrix("m", torch.zeros(rows, columns, dtype=torch.bfloat16), bias=torch.arange(rows))

    layer = LayerExperts([matrix(64, 32)], [matrix(64, 32)], [matrix(32, 64)])
    first, second = (cut(layer, "BF16", CpuShare(*edges, 64)) for edges in ((0, 32), (32, 64)))
    assert first.down[0].bias is not None and second.down[0].bias is None
    assert torch.equal(second.gate[0].bias, torch.arange(32, 64))


@pytest.mark.parametrize(("method", "begin"), [("FP8", 64), ("MXFP4", 16), ("GPTQ_INT4", 4)])
def test_a_cut_through_a_block_is_refused(method, begin):
    with pytest.raises(ConfigurationError, match=f"cannot be cut from {begin} to {INTERMEDIATE}"):
        _layer(method, begin)


@pytest.mark.parametrize("share", [CpuShare.nothing(INTERMEDIATE), CpuShare.everything(INTERMEDIATE + 32)])
def test_a_share_of_nothing_or_of_another_layer_is_refused(share):
    with pytest.raises(ConfigurationError, match="expected a part of moe_intermediate_size, 320"):
        make_layer("BF16", hidden_size=HIDDEN, moe_intermediate_size=INTERMEDIATE, share=share)


def test_a_share_outside_of_the_layer_is_refused():
    with pytest.raises(ConfigurationError, match="from 0 to 33 was asked for"):
        CpuShare(0, 33, 32)
