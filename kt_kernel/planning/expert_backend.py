"""Which of SGLang's kernels compute a plan's experts on a GPU, where its own choice takes all or none.

SGLang 0.5.23 chooses for gpt-oss kernels that do the routing themselves, over all experts
(integrations/sglang/device_backends.py refuses them).
"""

from __future__ import annotations

from kt_kernel.planning.machine_facts import Gpu
from kt_kernel.planning.model_facts import ModelFacts

_ROUTES_ITSELF = ("GptOssForCausalLM",)
_MARLIN_TAKES_MXFP4_SINCE = (9, 0)


def expert_backend(facts: ModelFacts, gpu: Gpu) -> str | None:
    """The value of --moe-runner-backend; None leaves the choice to SGLang."""
    if facts.sizes.architecture not in _ROUTES_ITSELF:
        return None
    return "marlin" if facts.method == "MXFP4" and _has_marlin(gpu) else "triton"


def takes_experts(facts: ModelFacts, gpu: Gpu) -> bool:
    """Can those kernels compute any? `triton` has none for MXFP4."""
    return expert_backend(facts, gpu) != "triton" or facts.method != "MXFP4"


def _has_marlin(gpu: Gpu) -> bool:
    return (gpu.capability or (8, 0)) >= _MARLIN_TAKES_MXFP4_SINCE
