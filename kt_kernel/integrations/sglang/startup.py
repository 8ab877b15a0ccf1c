"""The plug-in's step in SGLang's configuration: from flags to settings, checked against the model and other
options.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from kt_kernel.errors import ConfigurationError, FeatureUnavailableError, KTError
from kt_kernel.hybrid.layout import expert_layout
from kt_kernel.integrations.sglang import (
    chunk_size,
    cpu_defaults,
    dense_weights,
    device_backends,
    hooking,
    host_address,
    numa_binding,
    one_host,
    recurrent_states,
    temporary_files,
)
from kt_kernel.integrations.sglang.cli import COMMAND_LINE_ATTRIBUTE, FLAGS_ATTRIBUTE
from kt_kernel.integrations.sglang.draft import with_draft
from kt_kernel.integrations.sglang.flags import FLAGS, KTFlags, check_flags
from kt_kernel.integrations.sglang.other_options import check_other_options
from kt_kernel.integrations.sglang.served_adapter import check_adapter
from kt_kernel.integrations.sglang.settings import SETTINGS_ATTRIBUTE, make_settings
from kt_kernel.integrations.sglang.update_formats import check_update_format

logger = logging.getLogger(__name__)

# The step of SGLang's pipeline we follow: the device, the model's configuration and the chunk size are
# known after it.
PIPELINE_STEP = "handle_gpu_memory_settings"
SOURCE = "kt-kernel"

# SGLang's own upper bound on running requests when none is given (`resolve_max_num_reqs`).
_DEFAULT_RUNNING_REQUESTS = 4096


def configure(server_args: Any, previous: Callable[[Any], None]) -> None:
    """SGLang's step, then ours. Runs once, in the launching process, for servers and for `sglang.Engine`."""
    from sglang.srt.arg_groups.overrides import resolving_view

    left_open = chunk_size.OpenChoices.of(resolving_view(server_args))
    previous(server_args)
    try:
        _configure(server_args, left_open)
    except KTError as error:
        if getattr(server_args, COMMAND_LINE_ATTRIBUTE, False):
            raise SystemExit(f"error: {error}") from None
        raise


def _configure(server_args: Any, left_open: chunk_size.OpenChoices) -> None:
    from sglang.srt.arg_groups.overrides import declare_resolution, model_config_of, resolving_view

    options = resolving_view(server_args)
    flags = getattr(server_args, FLAGS_ATTRIBUTE, None)
    if flags is None:
        values = {flag.destination: getattr(options, flag.destination, None) for flag in FLAGS}
        flags = KTFlags.read(values)
    if flags.weight_path is None:
        return
    hooking.verify()
    check_flags(flags)
    flags = replace(flags, method=flags.options().weight_method())
    check_other_options(options)
    device_backends.check_option(options.moe_runner_backend)
    model = model_config_of(server_args)
    dense_weights.check_model(model)
    settings = make_settings(flags, expert_layout(model.hf_text_config), _most_tokens_of_a_call(options))
    declare_resolution(server_args, SOURCE, **chunk_size.choose(settings, options, model, left_open))
    _check_chunks(options, flags)
    check_adapter(settings, options)
    # Replicas of a model (--dp-size) know nothing of each other's cores.
    shares_experts = settings.shares_experts and options.dp_size == 1
    settings = replace(settings, max_tokens=_most_tokens_of_a_call(options), shares_experts=shares_experts)
    settings = with_draft(settings, options, model)
    experts = settings.options
    if experts.enable_dynamic_expert_update:
        check_update_format(experts.method, model, options)
    declare_resolution(
        server_args,
        SOURCE,
        kt_method=experts.method,
        kt_cpuinfer=experts.cpuinfer,
        kt_threadpool_count=experts.threadpool_count,
        kt_num_gpu_experts=flags.num_gpu_experts or 0,
        # A fused shared expert is an additional routed expert to the layer, but not to the checkpoint.
        disable_shared_experts_fusion=True,
    )
    _leave_prefill_uncaptured(server_args, options)
    numa_binding.leave_to_engine(options)
    one_host.choose_environment(options)
    temporary_files.choose_environment(server_args)
    host_address.choose(options)
    if options.device == "cpu":
        declare_resolution(server_args, SOURCE, **cpu_defaults.choose(options, model))
        cpu_defaults.choose_environment(options)
        declare_resolution(server_args, SOURCE, **recurrent_states.choose(options, model))
        recurrent_states.choose_environment(model)
    setattr(server_args, SETTINGS_ATTRIBUTE, settings)
    logger.info(
        "kt-kernel: method %s from %s, %d threads in %d pools, %d of %d experts on the device, at most %d "
        "tokens a call",
        experts.method,
        experts.weight_path,
        experts.cpuinfer,
        experts.threadpool_count,
        settings.device_experts,
        settings.layout.num_experts * len(settings.layout.moe_layers),
        settings.max_tokens,
    )


def _check_chunks(options: Any, flags: KTFlags) -> None:
    """Prefill on the device is for chunks that reach the threshold."""
    threshold = flags.gpu_prefill_token_threshold or 0
    if threshold > options.chunked_prefill_size:
        raise ConfigurationError(
            f"--kt-gpu-prefill-token-threshold is {threshold}, but no chunk has more than the "
            f"{options.chunked_prefill_size} tokens of --chunked-prefill-size; lower the threshold, or use "
            "larger chunks."
        )


def _leave_prefill_uncaptured(server_args: Any, options: Any) -> None:
    """Prompts run without graphs, which SGLang captures on CUDA by default, one per number of tokens.

    A captured layer is split between CPU and device for good, whatever --kt-gpu-prefill-token-threshold says;
    the CPU would compute the padding up to the captured size; and each graph of each layer would keep host
    buffers of that size. Graphs for decoding stay.
    """
    from sglang.srt.arg_groups.overrides import declare_resolution
    from sglang.srt.model_executor.cuda_graph_config import Backend, Phase, with_phase

    backend = options.cuda_graph_config.prefill.backend
    if backend == Backend.DISABLED:
        return
    chosen = (Phase.PREFILL, "backend")
    if chosen in server_args._cuda_graph_config_locked:
        raise FeatureUnavailableError(
            f"not available yet: graphs of prompts (prefill backend {backend}) together with "
            "--kt-weight-path; leave the option out, or give --cuda-graph-backend-prefill disabled."
        )
    config = with_phase(options.cuda_graph_config, Phase.PREFILL, backend=Backend.DISABLED)
    declare_resolution(server_args, SOURCE, cuda_graph_config=config)
    # SGLang's later steps keep a choice that is marked as made.
    server_args._cuda_graph_config_locked.add(chosen)


def _most_tokens_of_a_call(options: Any) -> int:
    """Prefill is cut into chunks; a decode step has one token per running request, several when
    speculating.
    """
    running = options.max_running_requests or _DEFAULT_RUNNING_REQUESTS
    per_request = options.speculative_num_draft_tokens or 1
    return max(options.chunked_prefill_size, running * per_request)
