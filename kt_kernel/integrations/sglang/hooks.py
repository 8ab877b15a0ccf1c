"""What is hooked into SGLang, and why: the table. hooking.py says how, and proves that each took effect."""

from __future__ import annotations

from sglang.srt.plugins.hook_registry import HookType

from kt_kernel.integrations.sglang import (
    access,
    batch_failures,
    cli,
    client_apis,
    cpu_fixes,
    cpu_idle,
    cpu_operators,
    cpu_sampling,
    cpu_speculation,
    deaths,
    dense_weights,
    host_watch,
    layer_hooks,
    one_host,
    recorded_decode,
    request_checks,
    serving_hooks,
    temporary_files,
)
from kt_kernel.integrations.sglang.hooking import Hook
from kt_kernel.integrations.sglang.status import routes, tokens

EVERYWHERE = (
    Hook(
        "sglang.srt.server_args.ServerArgs.add_cli_args",
        HookType.AFTER,
        cli.add_flags,
        "SGLang has six of the --kt flags",
    ),
    Hook(
        "sglang.srt.server_args.ServerArgs.from_cli_args",
        HookType.AROUND,
        cli.read_flags,
        "carries the flags SGLang has no fields for",
    ),
    Hook(
        "sglang.srt.layers.moe.kt_ep_wrapper.create_kt_config_from_server_args",
        HookType.AROUND,
        layer_hooks.layer_settings,
        "a layer needs more settings than the stock configuration holds",
    ),
    Hook(
        "sglang.srt.layers.moe.kt_ep_wrapper.KTEPWrapperMethod",
        HookType.REPLACE,
        layer_hooks.KTEPWrapperMethod,
        "the stock method needs CUDA, masks ids in place while the CPU reads them, and knows no masks",
    ),
    Hook(
        "sglang.srt.model_executor.model_runner.ModelRunner.load_model",
        HookType.BEFORE,
        host_watch.begin,
        "a host that is gone leaves the others waiting without a limit of time",
    ),
    Hook(
        "sglang.srt.model_executor.model_runner.ModelRunner.forward",
        HookType.BEFORE,
        serving_hooks.begin_step,
        "experts change their places between two steps",
    ),
    Hook(
        "sglang.srt.model_executor.forward_batch_info.enable_num_token_non_padded",
        HookType.AROUND,
        serving_hooks.counts_padding,
        "the CPU would compute the padding of CUDA graphs",
    ),
    Hook(
        "sglang.srt.managers.io_struct.GenerateReqInput.normalize_batch_and_arguments",
        HookType.BEFORE,
        request_checks.check_samples,
        "a request for a million samples is copied a million times",
    ),
    Hook(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager._validate_one_request",
        HookType.BEFORE,
        request_checks.check_request,
        "ids outside the vocabulary end the scheduler",
    ),
    Hook(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager._create_tokenized_object",
        HookType.AFTER,
        request_checks.check_message,
        "a value of a wrong type ends the scheduler",
    ),
    Hook(
        "sglang.srt.sampling.penaltylib.min_new_tokens.BatchedMinNewTokensPenalizer._prepare",
        HookType.AFTER,
        request_checks.allow_the_end,
        "a grammar at its end and min_new_tokens leave no token, and the sampler raises",
    ),
    *(
        Hook(
            "sglang.srt.managers.tokenizer_control_mixin.TokenizerControlMixin"
            f".{action}_expert_distribution_record",
            HookType.BEFORE,
            client_apis.require_recording,
            "a server that records nothing must not answer that it does",
        )
        for action in ("start", "stop", "dump")
    ),
    Hook(
        "sglang.srt.entrypoints.ollama.serving.OllamaServing._convert_options_to_sampling_params",
        HookType.AROUND,
        client_apis.ollama_sampling,
        "Ollama's API does not sample as the model's makers say",
    ),
    Hook(
        "sglang.srt.managers.scheduler.Scheduler.run_event_loop",
        HookType.BEFORE,
        serving_hooks.begin_serving,
        "what graphs were captured with is no use of experts, and a model may have made none of ours",
    ),
    Hook(
        "sglang.srt.managers.scheduler.Scheduler.run_batch",
        HookType.AROUND,
        serving_hooks.run_batch,
        "an error of the CPU experts ends the requests of its batch, not the server",
    ),
    Hook(
        "sglang.srt.managers.tp_worker.TpModelWorker.forward_batch_generation",
        HookType.AROUND,
        batch_failures.compute,
        "an exception in one batch ends the server",
    ),
    Hook(
        "sglang.srt.managers.scheduler.Scheduler.process_batch_result",
        HookType.BEFORE,
        serving_hooks.process_batch_result,
        "on a GPU such an error is known only when the results are there",
    ),
    Hook(
        "sglang.srt.managers.scheduler_components.internal_state.SchedulerInternalStateController"
        ".get_internal_state",
        HookType.AFTER,
        serving_hooks.add_report,
        "/server_info reports where the experts are",
    ),
    Hook(
        "sglang.srt.managers.scheduler_components.metrics_reporter.SchedulerMetricsReporter"
        ".report_decode_stats",
        HookType.BEFORE,
        tokens.count_decode,
        "/kt shows tokens per second, which SGLang knows at intervals only",
    ),
    Hook(
        "sglang.srt.managers.scheduler.Scheduler.expert_distribution_handle",
        HookType.AROUND,
        serving_hooks.record_distribution,
        "SGLang's recorder does not know where experts are, and ends the server if it is not turned on",
    ),
    Hook(
        "sglang.srt.distributed.bootstrap._resolve_dist_init_method",
        HookType.AROUND,
        one_host.meeting_point,
        "the store of ranks on one host listens where clients ask",
    ),
    Hook(
        "torch.distributed.rendezvous._create_c10d_store",
        HookType.AROUND,
        one_host.store,
        "the store of ranks on one host listens on all interfaces, to whoever asks",
    ),
    Hook(
        "sglang.srt.managers.load_snapshot.shm_path_for",
        HookType.AFTER,
        temporary_files.own_name,
        "what a killed server leaves in shared memory says nowhere whose it was",
    ),
    Hook(
        "sglang.srt.entrypoints.engine._scheduler_died_error",
        HookType.AFTER,
        deaths.tell_at_start,
        "whatever the exit code, the out-of-memory killer is named",
    ),
    Hook(
        "sglang.srt.utils.watchdog.SubprocessWatchdog._check_processes",
        HookType.BEFORE,
        deaths.tell,
        "an exit code is no reason",
    ),
    Hook(
        "sglang.srt.sampling.watermarking.core.redact_watermark_secrets",
        HookType.AFTER,
        access.hide,
        "the key of the server is in its log, and /server_info tells it",
    ),
    Hook(
        "sglang.srt.sampling.watermarking.core.redact_watermark_command_line",
        HookType.AFTER,
        access.hide_on_command_line,
        "/server_info shows the command line, with the key",
    ),
    Hook(
        "sglang.srt.entrypoints.http_server._setup_and_run_http_server",
        HookType.BEFORE,
        access.close_to_web_pages,
        "every web page that somebody visits on this machine may ask the server",
    ),
    Hook(
        "sglang.srt.model_loader.loader.DefaultModelLoader._get_weights_iterator",
        HookType.AROUND,
        dense_weights.weights,
        "dense layers of GGUF files, and all quantised ones on a CPU, are decoded on their way",
    ),
)

# In the process that talks HTTP.
HTTP = (
    Hook(
        "sglang.srt.entrypoints.http_server.set_global_state",
        HookType.AFTER,
        routes.add_routes,
        "/kt shows the server to people",
    ),
    Hook(
        "sglang.srt.utils.auth.decide_request_auth",
        HookType.AROUND,
        routes.open_page,
        "a browser shows no page that asks for the server's key unless it comes without",
    ),
    Hook(
        "sglang.srt.utils.common.add_prometheus_middleware",
        HookType.AFTER,
        routes.read_before_metrics,
        "the figures of experts are gathered when /metrics is read",
    ),
)

CPU_ONLY = (
    Hook(
        "sglang.srt.layers.moe.fused_moe_native.moe_forward_native",
        HookType.AROUND,
        cpu_fixes.moe_forward_skipping,
        "ids of -1 (experts of ours) raise in scatter_, and clamped activations are computed wrongly",
    ),
    Hook(
        "sglang.srt.layers.quantization.mxfp4.Mxfp4MoEMethod.process_weights_after_loading",
        HookType.AROUND,
        cpu_fixes.decode_mxfp4_experts,
        "MXFP4 experts beside ours are decoded by triton_kernels, which need a GPU",
    ),
    Hook(
        "sglang.srt.configs.update_config.update_intermediate_size",
        HookType.AROUND,
        cpu_fixes.pad_intermediate_size,
        "a model with a size for each layer (Hunyuan) fails in arithmetic with a list",
    ),
    Hook(
        "sglang.srt.models.hunyuan.HunYuanAttention.__init__",
        HookType.AFTER,
        cpu_fixes.flatten_heads,
        "Hunyuan's queries have a row for each head, of which the attention layer takes as many as tokens",
    ),
    Hook(
        "sglang.srt.models.deepseek_common.attention_backend_handler.AttentionBackendRegistry.get_handler",
        HookType.AROUND,
        cpu_fixes.attention_handler,
        "backends of the CPU fall back to a handler for another: garbage, or bits that depend on neighbours",
    ),
    Hook(
        "sglang.srt.layers.rotary_embedding.factory.get_rope_wrapper",
        HookType.AROUND,
        cpu_fixes.rope,
        "latent attention without yarn fails an assertion on a CPU",
    ),
    Hook(
        "sglang.kernels.ops.elementwise.elementwise.fused_gate_sigmoid_mul_add",
        HookType.REPLACE,
        cpu_fixes.add_gated_shared_expert,
        "Qwen2's shared expert gate is a Triton kernel",
    ),
    Hook(
        "sglang.srt.models.minimax_m2.MiniMaxM2QKRMSNorm._forward_naive",
        HookType.REPLACE,
        cpu_fixes.normalise_queries_and_keys,
        "MiniMax-M2's norm of queries and keys is a Triton kernel",
    ),
    Hook(
        "sglang.srt.configs.model_config.ModelConfig.from_server_args",
        HookType.AROUND,
        dense_weights.model_config,
        "only models with CPU experts are decoded",
    ),
    Hook(
        "sglang.srt.configs.model_config.ModelConfig._parse_quant_hf_config",
        HookType.AROUND,
        dense_weights.checkpoint_quantisation,
        "the kernels of quantised linear layers need a GPU",
    ),
    Hook(
        "sglang.srt.model_loader.loader.DefaultModelLoader._get_all_weights",
        HookType.AROUND,
        dense_weights.all_weights,
        "quantised dense layers stay in their format",
    ),
    Hook(
        "torch.distributed.distributed_c10d.ProcessGroupGloo",
        HookType.REPLACE,
        cpu_idle.SharedDeviceGloo,
        "nine process groups have a thread each that wakes 100 times a second",
    ),
    Hook(
        "sglang.srt.speculative.eagle_worker_v2.EagleDraftWorker.init_lm_head",
        HookType.AROUND,
        cpu_speculation.share_embedding,
        "draft models wait for a CUDA device when they share the embedding",
    ),
    Hook(
        "sglang.srt.layers.attention.hybrid_linear_attn_backend.scatter_mamba_states_after_mtp_verify",
        HookType.REPLACE,
        cpu_speculation.commit_states,
        "the states of accepted drafts are committed by a Triton kernel",
    ),
)

# Where SGLang calls operators on the CPU, and they are ours.
CPU_OPERATORS = (
    Hook(
        "sglang.srt.model_executor.model_runner.ModelRunner.load_model",
        HookType.BEFORE,
        cpu_operators.start,
        "operators need threads before weights are packed",
    ),
    Hook(
        "sglang.srt.layers.amx_utils.dtype_is_supported",
        HookType.AROUND,
        cpu_operators.has_kernels,
        "packed weights are bfloat16 or float32",
    ),
    Hook(
        "sglang.srt.layers.vocab_parallel_embedding.ParallelLMHead.__init__",
        HookType.AROUND,
        cpu_operators.pack_head_of_floats,
        "a head of float32 is packed, too",
    ),
    Hook(
        "sglang.srt.models.deepseek_v2.MoEGate.forward",
        HookType.AROUND,
        cpu_operators.route_in_floats,
        "the stock router reads float32 weights as a matrix, packed or not",
    ),
    Hook(
        "sglang.srt.layers.amx_utils.dim_is_supported",
        HookType.AROUND,
        cpu_operators.any_shape,
        "panels have no limits of shape",
    ),
    Hook(
        "sglang.srt.layers.amx_utils._amx_process_weight_after_loading",
        HookType.AROUND,
        cpu_operators.pack,
        "experts that SGLang holds on the CPU are not packed",
    ),
    Hook(
        "sglang.srt.models.deepseek_common.attention_forward_methods.forward_mla_fused_rope_cpu."
        "DeepseekMLACpuForwardMixin.init_mla_fused_rope_cpu_forward",
        HookType.AROUND,
        cpu_fixes.fuse_projections,
        "the fused projections of latent attention turn pairs side by side, whatever the model does",
    ),
    Hook(
        "sglang.srt.model_executor.runner.eager_runner.EagerRunner._execute_decode",
        HookType.AROUND,
        recorded_decode.decode,
        "a decode step is replayed without the model's Python",
    ),
    Hook(
        "sglang.srt.layers.sampler.Sampler.forward",
        HookType.AROUND,
        cpu_sampling.sample,
        "torch sorts the whole vocabulary for each token",
    ),
    Hook(
        "sglang.srt.layers.moe.topk.fused_topk",
        HookType.AROUND,
        cpu_operators.scaled_topk,
        "MiniMax-M3's routing scales its weights, which the stock function refuses",
    ),
    Hook(
        "sglang.srt.model_executor.model_runner_components.weight_exporter.WeightExporter"
        "._weight_export_unsupported_reason",
        HookType.AROUND,
        cpu_operators.refuse_export,
        "packed weights are no matrices that could be read",
    ),
    *(
        Hook(
            f"sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater.{method}",
            HookType.AROUND,
            cpu_operators.refuse_new_weights,
            "packed weights are no matrices that could be written into",
        )
        for method in (
            "update_weights_from_disk",
            "update_weights_from_tensor",
            "update_weights_from_ipc",
            "load_weights_from_distributed",
        )
    ),
)
