"""SGLang's options that do not go with CPU experts, refused at the start."""

from __future__ import annotations

from typing import Any

from kt_kernel.errors import ConfigurationError, FeatureUnavailableError

# Decoding in one graph per batch size, or without graphs; anything else is not known to call us rightly.
_DECODE_BACKENDS = ("full", "disabled")


def check_other_options(options: Any) -> None:
    """SGLang options that would make the CPU experts compute something else, or nothing."""
    if (options.chunked_prefill_size or 0) <= 0:
        raise ConfigurationError(
            f"--chunked-prefill-size is {options.chunked_prefill_size}, but the CPU experts size their "
            "buffers by it; "
            "give a positive number such as 4096."
        )
    for option, is_set in (
        (f"--ep-size {options.ep_size}", options.ep_size > 1),
        ("--enable-eplb", options.enable_eplb),
        (
            f"--ep-num-redundant-experts {options.ep_num_redundant_experts}",
            options.ep_num_redundant_experts > 0,
        ),
        (f"--moe-a2a-backend {options.moe_a2a_backend}", options.moe_a2a_backend not in (None, "none")),
        ("--enable-two-batch-overlap", options.enable_two_batch_overlap),
        # SGLang's layers leave it out without a word where the experts are ours.
        ("--enable-paged-experts", options.enable_paged_experts),
        # Its processes read none of our hooks: requests would reach the scheduler without being checked.
        (f"--tokenizer-worker-num {options.tokenizer_worker_num}", options.tokenizer_worker_num > 1),
        # It lends all of a layer's experts to other ranks, and makes every one of them the device's.
        (f"--dwdp-size {options.dwdp_size}", options.dwdp_size > 1),
        ("--enable-lora", bool(options.enable_lora)),
        # It gathers the tokens of several replicas in one call.
        ("--enable-dp-attention", bool(options.enable_dp_attention)),
        # It would trace through the calls of the CPU experts.
        ("--enable-torch-compile", bool(options.enable_torch_compile)),
        # Graphs in pieces are many per size, each with host buffers of its own.
        (
            f"--cuda-graph-backend-decode {options.cuda_graph_config.decode.backend}",
            options.cuda_graph_config.decode.backend not in _DECODE_BACKENDS,
        ),
    ):
        if is_set:
            raise FeatureUnavailableError(
                f"not available yet: {option} together with --kt-weight-path; leave it out."
            )
