"""Runs in a process of its own: the formats of `kt doctor --device`, up to the kernels of a GPU."""

from __future__ import annotations

import cuda_code
import torch
from inside_slots import enter

# The kernel that multiplies slots in the format; decoded ones are Triton's.
KERNELS = {
    "9.0": {
        "FP8": "per_token_group_quant",
        "FP8_PERCHANNEL": "per_token_quant_fp8",
        "RAWINT4": "moe_wna16_marlin_gemm",
        "GPTQ_INT4": "moe_wna16_marlin_gemm",
        "MXFP4": "moe_wna16_marlin_gemm",
        "NVFP4": "moe_wna16_marlin_gemm",
    }
}


def check_formats(capability: str) -> None:
    """Slots of every format are made, filled and given to SGLang's kernels, which compute nothing here.

    So the results cannot be right, and the trial must say that of each, and nothing else.
    """
    enter(capability)
    from kt_kernel.integrations.sglang.format_checks import FORMAT_CHECKS

    for check in FORMAT_CHECKS:
        cuda_code.CALLS.clear()
        verdict = check.run(torch.device("cpu"))
        entries = {call.entry.rpartition(".")[2] for call in cuda_code.CALLS}
        kernel = KERNELS[capability].get(check.method)
        assert not verdict.is_right
        if kernel is None:
            assert "requires SM100" in verdict.reason, verdict
        else:
            assert "results differ" in verdict.reason, (check.method, verdict)
            assert {kernel, "fused_moe_kernel"} <= entries, (check.method, entries)
    print("reached")
