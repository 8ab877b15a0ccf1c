"""Defects of the integrations with SGLang and transformers."""

from __future__ import annotations

from mutant import Mutant

METHOD = ("tests/serving/test_moe_method.py",)
PROBE = ("tests/transformers/test_activation_probe.py",)

MUTANTS = (
    Mutant("integrations/sglang/moe_method.py", "layer.moe_ep_size != 1", "False", METHOD),
    Mutant("integrations/sglang/moe_method.py", "layer.num_fused_shared_experts > 0", "False", METHOD),
    Mutant("integrations/sglang/moe_method.py", 'config.activation != "silu"', "False", METHOD),
    Mutant("integrations/sglang/moe_method.py", "not config.is_gated", "False", METHOD),
    Mutant("integrations/sglang/moe_method.py", "config.gemm1_beta not in (None, 1.0)", "False", METHOD),
    Mutant("integrations/sglang/moe_method.py", "(config.apply_router_weight_on_input,", "(False,", METHOD),
    Mutant("integrations/sglang/moe_method.py", "        return factor\n", "        return 1.0\n", METHOD),
    Mutant(
        "integrations/sglang/moe_method.py", " or layer.should_fuse_routed_scaling_factor_in_topk", "", METHOD
    ),
    Mutant("integrations/transformers/activations.py", "-100.0, -3.0", "-5.0, -3.0", PROBE),
    Mutant("integrations/transformers/activations.py", "3.0, 100.0", "3.0, 5.0", PROBE),
    Mutant(
        "integrations/transformers/experts.py",
        "(hidden_states.requires_grad or top_k_weights.requires_grad)",
        "hidden_states.requires_grad",
        ("tests/transformers/test_patch_errors.py", "-k", "gradients"),
    ),
)
