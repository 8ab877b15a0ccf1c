"""Risk: an operator that SGLang looks up does not exist, or exists with another schema than its twin."""

from __future__ import annotations

import logging
import os

import pytest
import torch

from kt_kernel import kt_kernel_ext
from kt_kernel.operators import registration

NATIVE = dict(schema.split("(", 1) for schema in kt_kernel_ext.operator_schemas())


def test_native_operators_have_twins_of_the_same_schema():
    without = [name for name in NATIVE if name.startswith("sgl_kernel::") and name not in registration.TWINS]
    assert not without
    for name, twin in registration.TWINS.items():
        if name in NATIVE:
            native = torch._C.parse_schema(f"{name}({NATIVE[name]}")
            assert torch._C.parse_schema(name + twin.schema) == native


def test_python_operators_stand_where_there_is_no_native_one():
    names = registration.python_operators().keys()
    assert names and not names & NATIVE.keys()
    packed = {"sgl_kernel::shared_expert_cpu", "sgl_kernel::bmm_cpu"} - NATIVE.keys()
    for name in packed:  # the twin would read packed weights as numbers
        with pytest.raises(NotImplementedError, match=f"{name} is not computed by kt-kernel"):
            registration.python_operators()[name].function()


def test_an_operator_without_anything_names_itself():
    registration.register_twins()
    registration.register_twins()
    with pytest.raises(
        NotImplementedError, match="sgl_kernel::conv3d_embed_weight_pack is not computed by kt-"
    ):
        torch.ops.sgl_kernel.conv3d_embed_weight_pack(torch.zeros(1))


def test_a_twin_that_computes_says_so_once(caplog):
    operator = registration.python_operators()["sgl_kernel::fused_dual_residual_rmsnorm_cpu"]
    ones = torch.ones(1, 8)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            normed, residual = operator.function(ones, ones, ones[0], ones[0], 1e-6)
    assert torch.allclose(normed, ones) and torch.allclose(residual, 2 * ones)
    assert [record.getMessage() for record in caplog.records] == [
        "kt-kernel: sgl_kernel::fused_dual_residual_rmsnorm_cpu has no native kernel and is computed by torch"
    ]


def test_ranks_of_one_host_sum_over_sglangs_own_groups(monkeypatch):
    """SGLang takes the shared memory of `initialize` where LOCAL_SIZE is the number of ranks."""
    registration.register_twins()
    monkeypatch.setenv("LOCAL_SIZE", "2")
    torch.ops.sgl_kernel.init_cpu_threads_env("0,1")
    torch.ops.sgl_kernel.initialize(2, 0)
    assert os.environ["LOCAL_SIZE"] == "0"
