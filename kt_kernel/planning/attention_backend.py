"""Which attention code SGLang 0.5.23 takes by itself, so that a plan can say it; the flag is left alone.

The rules are those of its `get_default_attn_backend` (srt/arg_groups/model_override_base.py), and of its
override for DeepSeek's sparse attention.
"""

from __future__ import annotations

from kt_kernel.planning.machine_facts import Gpu
from kt_kernel.planning.model_facts import MLA, Sizes
from kt_kernel.planning.user_options import UserOptions

_SPARSE = ("DeepseekV32ForCausalLM", "GlmMoeDsaForCausalLM")
_WITH_SINKS = ("GptOssForCausalLM",)
_OURS = "kt-kernel's CPU operators"


def attention_backend(sizes: Sizes, options: UserOptions, gpu: Gpu | None) -> str:
    """For people: the name, and who chose it. `gpu`: None where the server uses none."""
    if (asked := options.text("--attention-backend")) is not None:
        return f"{asked} (asked for)"
    if gpu is None:
        return "torch" if options.text("--kt-cpu-operators") == "off" else _OURS
    major, _ = gpu.capability or (8, 0)
    return f"{_on_cuda(sizes, major)} (SGLang's choice)"


def _on_cuda(sizes: Sizes, major: int) -> str:
    if sizes.architecture in _SPARSE:
        return "dsa"
    if major == 9:
        return "fa3"
    if sizes.attention == MLA:
        return "flashinfer" if major == 10 else "triton"
    if major == 10:
        return "trtllm_mha"
    return "triton" if sizes.architecture in _WITH_SINKS else "flashinfer"
