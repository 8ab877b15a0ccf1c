"""config.json and generation_config.json from a file's metadata."""

from __future__ import annotations

from typing import Any

from kt_kernel.gguf_model.architectures import require_architecture
from kt_kernel.gguf_model.fields import Fields, number

# Markers that end an answer beside the file's own, by their usual spelling: files name only one or two.
_ENDS = (
    "<|im_end|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|end_of_text|>",
    "<|eom_id|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
)
_ROLES_THAT_END = ("eos", "eot", "eom")
_CONTROL = 3


def model_config(fields: Fields) -> dict[str, Any]:
    """What config.json holds; raises CheckpointError where the file does not say enough."""
    architecture = require_architecture(fields)
    return {
        "vocab_size": fields.vocabulary,
        "hidden_size": fields.hidden,
        "num_hidden_layers": fields.layers,
        "num_attention_heads": fields.heads,
        "num_key_value_heads": fields.kv_heads,
        "num_experts_per_tok": fields.experts_per_token,
        "max_position_embeddings": fields.integer("context_length"),
        "rms_norm_eps": fields.real("attention.layer_norm_rms_epsilon"),
        "rope_parameters": fields.rope,
        "hidden_act": "silu",
        "tie_word_embeddings": fields.is_tied,
        "dtype": "bfloat16",
        **token_ids(fields),
        **architecture.config(fields),
    }


def generation_config(fields: Fields) -> dict[str, Any]:
    """Which tokens end an answer, and how the model's makers sample."""
    metadata = fields.file.metadata
    sampling: dict[str, Any] = {}
    for ours, theirs in (("temperature", "temp"), ("top_p", "top_p"), ("min_p", "min_p")):
        if (value := metadata.get(f"general.sampling.{theirs}")) is not None:
            sampling[ours] = number(value)
    if (top_k := metadata.get("general.sampling.top_k")) is not None:
        sampling["top_k"] = int(top_k)
    if sampling:
        sampling["do_sample"] = True
    return {**token_ids(fields), **sampling}


def token_ids(fields: Fields) -> dict[str, Any]:
    """bos_token_id, pad_token_id, and in eos_token_id all that end an answer."""
    metadata = fields.file.metadata
    found: dict[str, Any] = {}
    for ours, theirs in (("bos", "bos"), ("pad", "padding")):
        if (token := metadata.get(f"tokenizer.ggml.{theirs}_token_id")) is not None:
            found[f"{ours}_token_id"] = int(token)
    ends = [metadata.get(f"tokenizer.ggml.{role}_token_id") for role in _ROLES_THAT_END]
    ends = [int(end) for end in ends if end is not None] + _usual_ends(fields)
    if ends:
        ends = list(dict.fromkeys(ends))
        found["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    return found


def _usual_ends(fields: Fields) -> list[int]:
    tokens = fields.file.metadata.get("tokenizer.ggml.tokens", ())
    kinds = fields.file.metadata.get("tokenizer.ggml.token_type", ())
    return [
        index
        for index, (token, kind) in enumerate(zip(tokens, kinds, strict=False))
        if kind == _CONTROL and token in _ENDS
    ]
