"""Decoding of dense layers on their way into SGLang, without a server."""

from __future__ import annotations

import random

import pytest
import quantised
import torch

from kt_kernel import kt_kernel_ext, operators
from kt_kernel.engine import get_engine
from kt_kernel.errors import CheckpointError
from kt_kernel.hybrid.layout import ExpertLayout
from kt_kernel.integrations.options import ExpertOptions
from kt_kernel.integrations.sglang.dense_weights import DecodingPlan, decoded, stored_weight
from kt_kernel.integrations.sglang.settings import KTSettings
from kt_kernel.integrations.sglang.stored_weight import StoredWeight

MAKERS = {
    "fp8 blocks, float32 scales": quantised.fp8_blocks(torch.float32),
    "fp8 blocks, bfloat16 scales": quantised.fp8_blocks(torch.bfloat16),
    "fp8 rows": quantised.fp8_rows,
    "mxfp8": quantised.mxfp8,
    "mxfp4": quantised.mxfp4,
    "nvfp4": quantised.nvfp4,
    "int4, groups of 32": quantised.packed_int4(32),
    "int4, one group": quantised.packed_int4(320),
    "gptq, groups of 64": quantised.gptq_int4(64),
}
PLAN = DecodingPlan({"quant_method": "fp8"})


def stream(*layers: tuple[str, dict[str, torch.Tensor]]) -> list[tuple[str, torch.Tensor]]:
    return [(f"{layer}.{part}", tensor) for layer, parts in layers for part, tensor in parts.items()]


def decode_one(parts: dict[str, torch.Tensor]) -> torch.Tensor:
    return dict(decoded(stream(("q", parts)), PLAN, torch.float32))["q.weight"]


@pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS)
def test_decoded_exactly_whatever_the_order_of_the_tensors(maker):
    torch.manual_seed(0)
    # 160 rows and 320 columns: the last blocks of 128 are cut off.
    stored, meant = maker(160, 320, 0.1)
    other_stored, other_meant = maker(160, 320, 0.2)
    plain = ("norm.weight", torch.ones(3, dtype=torch.bfloat16))
    for seed in range(5):
        tensors = [*stream(("a.q_proj", stored), ("b.q_proj", other_stored)), plain]
        random.Random(seed).shuffle(tensors)
        found = dict(decoded(tensors, PLAN, torch.float32))
        assert set(found) == {"a.q_proj.weight", "b.q_proj.weight", "norm.weight"}
        assert torch.equal(found["a.q_proj.weight"], meant)
        assert torch.equal(found["b.q_proj.weight"], other_meant)
        assert found["norm.weight"] is plain[1]


def test_other_names_for_the_same_numbers():
    """compressed-tensors' MXFP4 and NVFP4, and its 4-bit integers as bytes."""
    torch.manual_seed(0)
    stored, meant = quantised.mxfp4(160, 320, 0.1)
    other = {
        "weight_packed": stored["weight"].view(torch.uint8),
        "weight_scale": stored["scale"].view(torch.uint8),
    }
    assert torch.equal(decode_one(other), meant)
    stored, meant = quantised.nvfp4(160, 320, 0.1)
    other = {
        "weight_packed": stored["weight"],
        "weight_scale": stored["weight_scale"],
        "weight_global_scale": 1 / stored["weight_scale_2"],
    }
    assert torch.allclose(decode_one(other), meant, rtol=3e-7, atol=0)
    stored, meant = quantised.packed_int4(32)(160, 320, 0.1)
    assert torch.equal(
        decode_one({**stored, "weight_packed": stored["weight_packed"].view(torch.uint8)}), meant
    )


def test_deepseek_v4_and_mistral_blocks():
    """Powers of two per 128 x 128, and the scales of blocks under the name of those of rows."""
    torch.manual_seed(0)
    codes = torch.randn(160, 320).to(torch.float8_e4m3fn)
    exponents = torch.tensor([[127, 126, 120], [130, 0, 254]], dtype=torch.uint8)
    scales = torch.exp2(exponents.double() - 127)
    meant = codes.double() * scales.repeat_interleave(128, 0)[:160].repeat_interleave(128, 1)[:, :320]
    for parts in (
        {"weight": codes, "scale": exponents.view(torch.float8_e8m0fnu)},
        {"weight": codes, "weight_scale": scales.float()},
    ):
        assert torch.equal(decode_one(parts), meant.float())


def test_one_scale_for_the_whole_matrix():
    codes = torch.randn(16, 32).to(torch.float8_e4m3fn)
    for scale in (torch.tensor(0.5), torch.tensor([0.5])):
        parts = {"weight": codes, "weight_scale": scale, "input_scale": torch.tensor(2.0)}
        found = dict(decoded(stream(("q", parts)), PLAN, torch.bfloat16))
        assert torch.equal(found["q.weight"], (codes.float() * 0.5).bfloat16())


def test_scales_of_the_kv_cache_are_left_out():
    tensors = [("k_proj.k_scale", torch.ones(())), ("v_proj.v_scale", torch.ones(()))]
    assert list(decoded(tensors, PLAN, torch.float32)) == []


@pytest.mark.parametrize(
    ("parts", "sentence"),
    [
        ({"weight": torch.zeros(4, 4).to(torch.float8_e4m3fn)}, "holds weight float8_e4m3fn"),
        ({"weight_packed": torch.zeros(4, 4, dtype=torch.int32)}, "holds weight_packed int32"),
        (
            {"weight": torch.zeros(256, 4).to(torch.float8_e4m3fn), "weight_scale_inv": torch.ones(3, 1)},
            r"scales of shape \[3, 1\], expected \[2, 1\]",
        ),
        (
            {"weight_packed": torch.zeros(4, 4, dtype=torch.int32), "weight_zero_point": torch.ones(4)},
            "zero points",
        ),
    ],
)
def test_what_cannot_be_decoded_is_named(parts, sentence):
    with pytest.raises(CheckpointError, match=sentence) as raised:
        list(decoded(stream(("model.layers.0.q", parts)), PLAN, torch.float32))
    assert "model.layers.0.q" in str(raised.value)


def test_only_experts_of_the_device_pass():
    layout = ExpertLayout(num_layers=2, num_experts=4, moe_layers=(1,))
    settings = KTSettings(
        ExpertOptions(weight_path="w", method="FP8", cpuinfer=1, threadpool_count=1, num_gpu_experts=2),
        layout,
        max_tokens=64,
    )
    plan = DecodingPlan({"quant_method": "fp8"}, settings)
    passing = (
        "model.layers.1.mlp.experts.0.up_proj.weight",
        "language_model.model.layers.1.block_sparse_moe.experts.1.w1.weight_scale_inv",
        "model.layers.1.mlp.shared_experts.up_proj.weight",
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.2.mlp.experts.3.up_proj.weight",  # of a draft model
        "lm_head.weight",
    )
    left_out = (
        "model.layers.1.mlp.experts.2.up_proj.weight",
        "model.layers.1.mlp.experts.3.down_proj.weight_scale_2",
        "layers.1.ffn.experts.2.w1.scale",
    )
    assert [name for name in passing if plan.leaves_out(name)] == []
    assert [name for name in left_out if not plan.leaves_out(name)] == []


# ---- kept as they are -----------------------------------------------------------------------------


def keep_one(parts: dict[str, torch.Tensor], layer: str = "q") -> torch.Tensor:
    return dict(decoded(stream((layer, parts)), PLAN, torch.bfloat16, stored_weight))[f"{layer}.weight"]


@pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS)
def test_kept_weights_are_the_same_numbers_to_whoever_reads_them(maker):
    torch.manual_seed(0)
    stored, meant = maker(160, 320, 0.1)
    weight = keep_one(stored)
    assert isinstance(weight, StoredWeight)
    assert (tuple(weight.shape), weight.dtype, weight.device.type) == ((160, 320), torch.bfloat16, "cpu")
    numbers = meant.bfloat16()
    assert torch.equal(torch.empty(160, 320, dtype=torch.bfloat16).copy_(weight), numbers)
    assert torch.equal(weight.narrow(0, 32, 64), numbers[32:96])
    assert torch.equal(torch.cat([weight, numbers]), torch.cat([numbers, numbers]))
    assert not isinstance(torch.cat([weight, weight], dim=1), StoredWeight)


@pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS)
def test_kept_weights_are_multiplied_as_one_matrix(maker):
    torch.manual_seed(0)
    (first, first_meant), (second, second_meant) = maker(160, 320, 0.1), maker(96, 320, 0.05)
    weight = torch.cat([keep_one(first), keep_one(second)])
    assert isinstance(weight, StoredWeight)
    engine = get_engine(2, 1)
    operators.install(engine)
    parts = [matrix.as_part() for matrix in weight.matrices]
    linear = kt_kernel_ext.Linear(engine, k=320, parts=parts, activations="bf16")
    x = torch.randn(5, 320).bfloat16()
    got = torch.ops.kt_kernel.linear(linear.handle, x.float(), None)
    exact = x.double() @ torch.cat([first_meant, second_meant]).double().T
    assert (got - exact).norm() < 1e-5 * exact.norm()


def test_one_scale_for_the_whole_matrix_is_kept_as_one_per_row():
    codes = torch.randn(16, 32).to(torch.float8_e4m3fn)
    (matrix,) = keep_one({"weight": codes, "weight_scale": torch.tensor(0.5)}).matrices
    assert (matrix.method, matrix.scale.tolist()) == ("FP8_PERCHANNEL", [0.5] * 16)


def test_experts_and_shapes_without_kernels_are_decoded():
    torch.manual_seed(0)
    expert, meant = quantised.fp8_blocks(torch.float32)(160, 320, 0.1)
    found = keep_one(expert, "model.layers.1.mlp.experts.0.up_proj")
    assert type(found) is torch.Tensor
    assert torch.equal(found, meant.bfloat16())
    # Three groups of 107 columns and one less.
    ragged, _ = quantised.gptq_int4(64)(160, 320, 0.1)
    ragged["scales"] = ragged["scales"][:3]
    assert type(keep_one(ragged)) is torch.Tensor
