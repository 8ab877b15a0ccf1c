"""Runs in a process of its own: the machine of cuda_code.py itself."""

from __future__ import annotations

import cuda_code


def check_triton_launches(capability: str) -> None:
    """SGLang's own method and ours launch the same kernels, with slots in the place of experts."""
    cuda_code.enter(cuda_code.capability_of(capability))
    from layers import EXPERTS, SLOTS, compute, make_layer, method_of, served
    from sglang.srt.utils import get_device_capability, is_cuda

    assert is_cuda() and get_device_capability() == cuda_code.capability_of(capability)
    for slots, experts in ((None, EXPERTS), (SLOTS, SLOTS)):
        cuda_code.CALLS.clear()
        with served():
            layer = make_layer(slots=slots)
            assert type(method_of(layer)).__name__ == "UnquantizedFusedMoEMethod"
            layer.quant_method.process_weights_after_loading(layer)
            compute(layer)
        launches = [call for call in cuda_code.CALLS if call.entry.endswith(".fused_moe_kernel")]
        assert len(launches) == 2, [call.entry for call in cuda_code.CALLS]
        weights = [argument.shape for argument in launches[0].args if getattr(argument, "ndim", 0) == 3]
        assert weights[0][0] == experts, weights
