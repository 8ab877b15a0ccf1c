"""`load`: a model of transformers whose experts are ours and have gradients."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import transformers

from kt_kernel.cores import bind
from kt_kernel.errors import ConfigurationError, FeatureUnavailableError
from kt_kernel.integrations.options import ExpertOptions
from kt_kernel.integrations.transformers.blocks import ExpertsBlock, find_experts, replace_module
from kt_kernel.integrations.transformers.loading import check_path, without_experts
from kt_kernel.integrations.transformers.patching import MOST_TOKENS, check_rows, experts_per_token
from kt_kernel.training.adapter_names import name_experts
from kt_kernel.training.chosen import KERNELS, choose_backend
from kt_kernel.training.experts import TrainableExperts
from kt_kernel.training.full import FULL, LORA, FullExperts, check_trained, saves_as_transformers
from kt_kernel.training.host import Place, meet
from kt_kernel.training.names import projection_names
from kt_kernel.training.weights import AS_STORED, PackedWeights, load_experts, method_of


def load(
    auto_class: type,
    name: str | os.PathLike,
    *,
    experts: str = AS_STORED,
    train_experts: str = LORA,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    threads: int | None = None,
    backend: str = KERNELS,
    **expert_options: Any,
) -> transformers.PreTrainedModel:
    """The causal language model `name`, a local directory or a repository of the Hub, ready to be trained.

    `auto_class` is AutoModelForCausalLM. `experts`: the format of their weights in memory: "as stored",
    "bf16", "int8" or "int4". `train_experts`: "lora", their weights are frozen and LoRA comes on top
    (`lora_config`); or "full", they are parameters of transformers' shapes, `gate_up_proj` [E, 2I, H] and
    `down_proj` [E, H, I], on the CPU in `dtype`, as are their gradients, and packed as bf16 besides.
    Everything else is loaded to `device` in `dtype` (default: what config.json says), and has gradients as
    transformers leaves them. `threads` compute the experts, one per usable core by default; `expert_options`
    are further fields of ExpertOptions (`numa_nodes`, `threadpool_count`, ...). `backend`: "kernels", which
    multiply as a server does (with `activations="bf16"` among the options, also int8 and 4-bit experts by
    bfloat16), or "reference", which computes in float32, slowly, for comparisons.

    Where torchrun or accelerate started several processes on this host, all of them call this: they share one
    copy of frozen experts, and each is bound to its part of the cores.

    Raises a KTError in one sentence if the model or its files cannot be used.
    """
    if auto_class is not transformers.AutoModelForCausalLM:
        raise FeatureUnavailableError(
            f"auto_class is {getattr(auto_class, '__name__', auto_class)}, but only AutoModelForCausalLM is "
            "available; give that."
        )
    path = _local(os.fspath(name))
    check_path(path)
    options = ExpertOptions(**{"weight_path": path, "cpuinfer": threads, **expert_options})
    _refuse_device_experts(options)
    options = options.with_method()
    method = method_of(experts, options.method)
    check_trained(train_experts, method, path)
    place = Place.of_environment()
    if options.gguf_mmap and place.count > 1:
        raise FeatureUnavailableError(
            f"gguf_mmap was asked for by one of {place.count} processes of this host, but only packed "
            "experts are shared among processes; leave it out."
        )
    host = meet(place, {"model": path, "experts": method, "train_experts": train_experts})
    if host.cores is not None and options.numa_nodes is None:
        bind(host.cores)
    options = options.with_threads()
    model = without_experts(path, dtype).to(device)
    blocks = find_experts(model)
    check_rows(blocks, options)
    top_k = experts_per_token(model.config.get_text_config())
    names = projection_names(model)
    for block in blocks:
        layer = _layer(block, top_k)
        load_layer = partial(load_experts, options, method, layer)
        if train_experts == FULL:  # each process has parameters of its own, and packs them
            module = FullExperts(load_layer(), backend, block, names, model.dtype)
        else:
            wrapper = host.layer(load_layer, partial(replace(options, method=method).wrapper, **layer))
            weights = PackedWeights(wrapper)
            chosen = choose_backend(backend, wrapper, weights, block.swiglu)
            module = TrainableExperts(chosen, weights, names, block.rows)
        replace_module(model, block.path, module)
    if train_experts == FULL:
        return saves_as_transformers(model)
    model.save_pretrained = _refuse_to_save(path)
    model.register_load_state_dict_pre_hook(name_experts)
    return model


def _layer(block: ExpertsBlock, top_k: int) -> dict[str, Any]:
    return {
        "layer_idx": block.layer_idx,
        "num_experts": block.num_experts,
        "num_experts_per_tok": top_k,
        "hidden_size": block.hidden_size,
        "moe_intermediate_size": block.intermediate_size,
        "chunked_prefill_size": MOST_TOKENS,
        "swiglu_limit": block.swiglu.limit,
        "swiglu_alpha": block.swiglu.alpha,
    }


def _local(name: str) -> str:
    """The directory of a model of the Hub, downloaded if it is not there yet."""
    if os.path.exists(name) or name.startswith((".", os.sep)) or name.count("/") != 1:
        return name
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return snapshot_download(name, ignore_patterns=["*.bin", "*.pth", "*.gguf", "original/*"])
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigurationError(
            f"'{name}' is no local directory, and the Hub does not give it ({reason}); check the name."
        ) from error


def _refuse_device_experts(options: ExpertOptions) -> None:
    if options.num_gpu_experts or options.gpu_experts_ratio or options.max_deferred_experts_per_token:
        raise FeatureUnavailableError(
            "experts on the device, or deferred ones, were asked for, but experts are trained on the CPU; "
            "leave num_gpu_experts, gpu_experts_ratio and max_deferred_experts_per_token out."
        )


def _refuse_to_save(path: str) -> Any:
    def save_pretrained(*arguments: Any, **options: Any) -> None:
        """Raises FeatureUnavailableError: the experts are no parameters, and would be left out."""
        raise FeatureUnavailableError(
            f"the model cannot be saved: its experts are those of '{path}', and would be missing; save the "
            "adapter (get_peft_model(...).save_pretrained), or write a merged checkpoint with kt sft export."
        )

    return save_pretrained
