"""Writes the demo model as a Mixtral-architecture safetensors checkpoint.

Tensor names are those of published Mixtral checkpoints (``block_sparse_moe.experts.E.w1/w3/w2`` =
gate/up/down), which SGLang, transformers and this package's reader all understand.  The output
head is written out although the dense model ties it to the embedding: SGLang's Mixtral has no tying.
Two shards and an index, so that the demo takes the path of a real checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch

from kt_kernel.demo.experts import NUM_EXPERTS, split_mlp
from kt_kernel.demo.gguf_source import Dimensions, SourceModel
from kt_kernel.demo.tokenizer import build_tokenizer

NUM_SHARDS = 2

# What a server uses when a request does not say: nearly always the likeliest token.  At temperature 1 so
# small a model answered a one-line question with 7000 tokens; at 0.2 its answer about France begins with a
# wrong "L'" in one of three tries (2026-11-21).
SAMPLING = {"temperature": 0.01}


def write_checkpoint(source: SourceModel, directory: Path) -> None:
    """Write weights, index, configuration and tokenizer into an existing empty directory."""
    _write_weights(source, directory)
    _write_configuration(source, directory)
    build_tokenizer(source).save_pretrained(directory)


def checkpoint_bytes(dimensions: Dimensions) -> int:
    """Bytes of all tensors `write_checkpoint` writes (bfloat16)."""
    d = dimensions
    attention = d.hidden * d.head_size * (2 * d.heads + 2 * d.kv_heads)
    mlp = 3 * d.hidden * d.intermediate + NUM_EXPERTS * d.hidden
    layer = attention + mlp + 2 * d.hidden
    return 2 * (d.layers * layer + 2 * d.vocabulary * d.hidden + d.hidden)


def layer_tensors(source: SourceModel, layer: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and bfloat16 tensors of one decoder layer."""
    gguf, here = f"blk.{layer}", f"model.layers.{layer}"
    for ours, theirs in (("q", "q"), ("k", "k"), ("v", "v"), ("o", "output")):
        yield f"{here}.self_attn.{ours}_proj.weight", source.weight(f"{gguf}.attn_{theirs}.weight")
    yield f"{here}.input_layernorm.weight", source.weight(f"{gguf}.attn_norm.weight")
    yield f"{here}.post_attention_layernorm.weight", source.weight(f"{gguf}.ffn_norm.weight")

    moe = f"{here}.block_sparse_moe"
    yield f"{moe}.gate.weight", torch.zeros(NUM_EXPERTS, source.dimensions.hidden, dtype=torch.bfloat16)
    mlp = (source.weight(f"{gguf}.ffn_{part}.weight") for part in ("gate", "up", "down"))
    for index, expert in enumerate(split_mlp(*mlp)):
        yield f"{moe}.experts.{index}.w1.weight", expert.gate
        yield f"{moe}.experts.{index}.w3.weight", expert.up
        yield f"{moe}.experts.{index}.w2.weight", expert.down


def _shard_tensors(source: SourceModel, shard: int) -> Iterator[tuple[str, torch.Tensor]]:
    layers = source.dimensions.layers
    if shard == 0:
        yield "model.embed_tokens.weight", source.weight("token_embd.weight")
    for layer in range(layers * shard // NUM_SHARDS, layers * (shard + 1) // NUM_SHARDS):
        yield from layer_tensors(source, layer)
    if shard == NUM_SHARDS - 1:
        yield "model.norm.weight", source.weight("output_norm.weight")
        yield "lm_head.weight", source.weight("token_embd.weight")


def _write_weights(source: SourceModel, directory: Path) -> None:
    from safetensors.torch import save_file

    weight_map: dict[str, str] = {}
    total_bytes = 0
    for shard in range(NUM_SHARDS):
        file_name = f"model-{shard + 1:05d}-of-{NUM_SHARDS:05d}.safetensors"
        tensors = dict(_shard_tensors(source, shard))
        save_file(tensors, directory / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file_name)
        total_bytes += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def _write_configuration(source: SourceModel, directory: Path) -> None:
    from transformers import GenerationConfig, MixtralConfig

    d = source.dimensions
    ids = {role: source.metadata(f"tokenizer.ggml.{key}_token_id") for role, key in _TOKEN_ROLES.items()}
    MixtralConfig(
        architectures=["MixtralForCausalLM"],
        vocab_size=d.vocabulary,
        hidden_size=d.hidden,
        intermediate_size=d.intermediate // NUM_EXPERTS,
        num_hidden_layers=d.layers,
        num_attention_heads=d.heads,
        num_key_value_heads=d.kv_heads,
        num_local_experts=NUM_EXPERTS,
        num_experts_per_tok=NUM_EXPERTS,
        max_position_embeddings=d.context,
        rms_norm_eps=d.rms_eps,
        rope_parameters={"rope_type": "default", "rope_theta": d.rope_theta},
        tie_word_embeddings=False,
        dtype="bfloat16",
        **ids,
    ).save_pretrained(directory)
    GenerationConfig(do_sample=True, **SAMPLING, **ids).save_pretrained(directory)


_TOKEN_ROLES = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
