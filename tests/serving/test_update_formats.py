"""Experts may move while serving where, and only where, the device's own format can be filled."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from kt_kernel.errors import FeatureUnavailableError
from kt_kernel.integrations.sglang.update_formats import check_update_format


def check(quantization, method, backend):
    model, options = SimpleNamespace(quantization=quantization), SimpleNamespace(moe_runner_backend=backend)
    check_update_format(method, model, options)


@pytest.mark.parametrize(
    ("quantization", "method", "backend"),
    [
        (None, "BF16", "auto"),
        (None, "RAWINT4", "triton"),
        ("fp8", "FP8", "auto"),
        ("fp8", "MXFP4", "marlin"),
        ("mxfp8", "MXFP8", "cutlass"),
        ("compressed-tensors", "RAWINT4", "auto"),
        ("compressed-tensors", "FP8_PERCHANNEL", "auto"),
        ("gptq_marlin", "GPTQ_INT4", "auto"),
        ("modelopt_fp4", "NVFP4", "marlin"),
    ],
)
def test_formats_that_are_filled_are_accepted(quantization, method, backend):
    check(quantization, method, backend)


@pytest.mark.parametrize(
    ("quantization", "method", "backend", "sentence"),
    [
        ("fp8", "BF16", "auto", "is fp8 on the device with BF16 experts on the CPU"),
        ("awq_marlin", "RAWINT4", "auto", "is awq_marlin on the device"),
        ("mxfp8", "MXFP8", "flashinfer_trtllm", "--moe-runner-backend flashinfer_trtllm; choose cutlass"),
        ("modelopt_fp4", "NVFP4", "flashinfer_cutlass", "flashinfer_cutlass; choose marlin"),
        (None, "BF16", "triton_kernel", "triton_kernel; choose triton"),
    ],
)
def test_all_others_are_refused_with_what_to_choose(quantization, method, backend, sentence):
    with pytest.raises(FeatureUnavailableError, match=sentence):
        check(quantization, method, backend)
