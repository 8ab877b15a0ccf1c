"""The dense twin: SmolLM2 as transformers' own LlamaForCausalLM, from the same GGUF file.

It shares nothing with the expert split, so agreement between the two says something.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kt_kernel.demo.gguf_source import SourceModel, find_source

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM

# Hugging Face name -> GGUF name, inside one decoder layer
_LAYER_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def load_dense_model(dtype: torch.dtype) -> LlamaForCausalLM:
    """The dense model in evaluation mode, its bfloat16 weights converted to `dtype`.

    Raises:
        DemoError: the source package is missing.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    source = SourceModel(find_source().path)
    d = source.dimensions
    config = LlamaConfig(
        vocab_size=d.vocabulary,
        hidden_size=d.hidden,
        intermediate_size=d.intermediate,
        num_hidden_layers=d.layers,
        num_attention_heads=d.heads,
        num_key_value_heads=d.kv_heads,
        max_position_embeddings=d.context,
        rms_norm_eps=d.rms_eps,
        rope_parameters={"rope_type": "default", "rope_theta": d.rope_theta},
        tie_word_embeddings=True,
        bos_token_id=source.metadata("tokenizer.ggml.bos_token_id"),
        eos_token_id=source.metadata("tokenizer.ggml.eos_token_id"),
        pad_token_id=source.metadata("tokenizer.ggml.padding_token_id"),
        dtype=dtype,
    )
    weights = {
        "model.embed_tokens.weight": source.weight("token_embd.weight"),
        "model.norm.weight": source.weight("output_norm.weight"),
    }
    for layer in range(d.layers):
        for ours, theirs in _LAYER_NAMES.items():
            weights[f"model.layers.{layer}.{ours}.weight"] = source.weight(f"blk.{layer}.{theirs}.weight")
    model = LlamaForCausalLM(config)
    # Assigned rather than copied, so that RoPE frequencies, which no file holds, stay in float32.
    weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    return model.eval()
