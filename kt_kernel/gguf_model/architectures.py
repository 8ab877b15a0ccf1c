"""The table of architectures: names of tensors, and the published model's configuration from the metadata.

A new architecture is a new row of ARCHITECTURES. Tensor names are given without their layer and without their
suffix (.weight, .bias), which both sides have in common, except where a name stands for one tensor alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

from kt_kernel.errors import CheckpointError
from kt_kernel.gguf_model.fields import Fields

Names = Mapping[str, str]

_SIGMOID = 2  # of expert_gating_func; 1 = softmax


class RopeRows(Enum):
    """How the rows of a head stand in the file's query and key projections.

    HALVES: as published, row j is rotated with row j + d/2. PAIRS: with its neighbour, so row 2j + s of the
    file is row s*(d/2) + j of the published projection.
    """

    HALVES = auto()
    PAIRS = auto()


@dataclass(frozen=True)
class ExpertNames:
    """Published names of one routed expert's matrices, below the layer."""

    path: str
    gate: str
    up: str
    down: str


@dataclass(frozen=True)
class Architecture:
    """`name`: general.architecture. `config`: what config.json holds beside what all models have.

    Tensors of every layer, of those with and of those without experts (empty: all have some); `optional` ones
    may be absent.
    """

    name: str
    config: Callable[[Fields], dict[str, Any]]
    layer: Names
    moe_layer: Names
    dense_layer: Names = field(default_factory=dict)
    optional: frozenset[str] = frozenset()
    experts: ExpertNames = ExpertNames("mlp.experts", "gate_proj", "up_proj", "down_proj")
    rope_rows: RopeRows = RopeRows.HALVES


# ---- names ----------------------------------------------------------------------------------------

WHOLE_MODEL: Names = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_ATTENTION: Names = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
_HEAD_NORMS: Names = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_LATENT_ATTENTION: Names = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",
    "attn_output": "self_attn.o_proj",
}
_AFTER_ATTENTION: Names = {"ffn_norm": "post_attention_layernorm"}
_MLP: Names = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_BIASED_ROUTER: Names = {
    "ffn_gate_inp": "mlp.gate",
    "exp_probs_b.bias": "mlp.gate.e_score_correction_bias",
}


def _shared(path: str) -> Names:
    return {
        "ffn_gate_shexp": f"{path}.gate_proj",
        "ffn_up_shexp": f"{path}.up_proj",
        "ffn_down_shexp": f"{path}.down_proj",
    }


_SHARED_EXPERTS = _shared("mlp.shared_experts")


# ---- configurations -------------------------------------------------------------------------------


def _qwen(fields: Fields) -> dict[str, Any]:
    return {
        "head_dim": fields.head_dim,
        "intermediate_size": fields.integer("feed_forward_length", fields.expert_size),
        "moe_intermediate_size": fields.expert_size,
        "num_experts": fields.experts,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _qwen2moe(fields: Fields) -> dict[str, Any]:
    return {
        "model_type": "qwen2_moe",
        "architectures": ["Qwen2MoeForCausalLM"],
        **_qwen(fields),
        "norm_topk_prob": bool(fields.get("expert_weights_norm", False)),
        "shared_expert_intermediate_size": fields.shared_expert_size,
        "qkv_bias": fields.has("attn_q.bias"),
        "use_sliding_window": False,
    }


def _qwen3moe(fields: Fields) -> dict[str, Any]:
    return {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        **_qwen(fields),
        "norm_topk_prob": bool(fields.get("expert_weights_norm", True)),
        "attention_bias": fields.has("attn_q.bias"),
        "use_sliding_window": False,
    }


def _mixtral(fields: Fields) -> dict[str, Any]:
    return {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "head_dim": fields.head_dim,
        "intermediate_size": fields.expert_size,
        "num_local_experts": fields.experts,
        "sliding_window": None,
    }


def _groups(fields: Fields) -> tuple[int, int]:
    """Groups of experts, and how many of them a token may choose from.

    Files from before the metadata had them: the published models with so many experts had these.
    """
    known = {256: (8, 4), 160: (8, 3)}.get(fields.experts, (1, 1))
    groups = fields.integer("expert_group_count", known[0] if fields.file.architecture == "deepseek2" else 1)
    chosen = fields.integer("expert_group_used_count", known[1] if groups == known[0] else groups)
    return max(groups, 1), max(chosen, 1)


def _grouped_routing(fields: Fields) -> dict[str, Any]:
    groups, chosen_groups = _groups(fields)
    return {
        "intermediate_size": fields.integer("feed_forward_length"),
        "moe_intermediate_size": fields.expert_size,
        "n_routed_experts": fields.experts,
        "n_shared_experts": fields.shared_expert_size // fields.expert_size or None,
        "n_group": groups,
        "topk_group": chosen_groups,
        "first_k_dense_replace": fields.leading_dense_layers,
        "norm_topk_prob": bool(fields.get("expert_weights_norm", False)),
        "routed_scaling_factor": fields.real("expert_weights_scale", 1.0),
    }


def _glm4moe(fields: Fields) -> dict[str, Any]:
    factor = fields.integer("rope.dimension_count", fields.head_dim) / fields.head_dim
    return {
        "model_type": "glm4_moe",
        "architectures": ["Glm4MoeForCausalLM"],
        **_grouped_routing(fields),
        "head_dim": fields.head_dim,
        "rope_parameters": {**fields.rope, "partial_rotary_factor": factor},
        "partial_rotary_factor": factor,
        "use_qk_norm": fields.has("attn_q_norm.weight"),
        "attention_bias": fields.has("attn_q.bias"),
        "num_nextn_predict_layers": 0,
    }


def _deepseek2(fields: Fields) -> dict[str, Any]:
    """Version 3 (also R1 and Kimi-K2) scores experts by sigmoid and selects them with a bias; version 2 by
    softmax."""
    corrected = fields.has("exp_probs_b.bias")
    sigmoid = fields.integer("expert_gating_func", _SIGMOID if corrected else 1) == _SIGMOID
    rotary = fields.integer("rope.dimension_count")
    keys = fields.integer("attention.key_length_mla", fields.integer("attention.key_length"))
    values = fields.integer("attention.value_length_mla", fields.integer("attention.value_length"))
    routing = _grouped_routing(fields)
    plain = "group_limited_greedy" if routing["n_group"] > 1 else "greedy"
    return {
        "model_type": "deepseek_v3" if sigmoid else "deepseek_v2",
        "architectures": ["DeepseekV3ForCausalLM" if sigmoid else "DeepseekV2ForCausalLM"],
        **routing,
        "num_key_value_heads": fields.heads,
        "q_lora_rank": fields.get("attention.q_lora_rank"),
        "kv_lora_rank": fields.integer("attention.kv_lora_rank"),
        "qk_rope_head_dim": rotary,
        "qk_nope_head_dim": keys - rotary,
        "v_head_dim": values,
        "rope_parameters": _deepseek_rope(fields),
        "moe_layer_freq": 1,
        "topk_method": "noaux_tc" if sigmoid else plain,
        "scoring_func": "sigmoid" if sigmoid else "softmax",
        "attention_bias": False,
        "num_nextn_predict_layers": 0,
    }


def _deepseek_rope(fields: Fields) -> dict[str, Any]:
    """Its yarn has two factors more, equal in all published models; the file holds a tenth of them."""
    rope = fields.rope
    tenth = fields.get("rope.scaling.yarn_log_multiplier")
    if rope["rope_type"] == "yarn" and tenth is not None:
        factor = float(f"{tenth * 10:.6g}")
        rope = {**rope, "mscale": factor, "mscale_all_dim": factor}
    return rope


def _minimax_m2(fields: Fields) -> dict[str, Any]:
    rotary = fields.integer("rope.dimension_count", fields.head_dim)
    return {
        "model_type": "minimax_m2",
        "architectures": ["MiniMaxM2ForCausalLM"],
        "head_dim": fields.head_dim,
        "rotary_dim": rotary,
        "rope_parameters": {**fields.rope, "partial_rotary_factor": rotary / fields.head_dim},
        "intermediate_size": fields.expert_size,
        "num_local_experts": fields.experts,
        "scoring_func": "sigmoid",
        "use_routing_bias": fields.has("exp_probs_b.bias"),
        "use_qk_norm": True,
        "qk_norm_type": "per_layer",
    }


def _gpt_oss(fields: Fields) -> dict[str, Any]:
    """Layers with a window and without take turns; limit and slope of the activation stand in no file."""
    window = fields.integer("attention.sliding_window")
    kinds = ("sliding_attention", "full_attention")
    return {
        "model_type": "gpt_oss",
        "architectures": ["GptOssForCausalLM"],
        "head_dim": fields.head_dim,
        "intermediate_size": fields.expert_size,
        "num_local_experts": fields.experts,
        "rope_parameters": {"beta_fast": 32.0, "beta_slow": 1.0, **fields.rope, "truncate": False},
        "sliding_window": window,
        "layer_types": [kinds[layer % 2] for layer in range(fields.layers)],
        "attention_bias": fields.has("attn_q.bias"),
        "swiglu_limit": 7.0,
        "swiglu_alpha": 1.702,
    }


# ---- the table ------------------------------------------------------------------------------------

ARCHITECTURES: Mapping[str, Architecture] = {
    row.name: row
    for row in (
        Architecture(
            "qwen3moe",
            _qwen3moe,
            layer={**_ATTENTION, **_HEAD_NORMS, **_AFTER_ATTENTION},
            moe_layer={"ffn_gate_inp": "mlp.gate"},
        ),
        Architecture(
            "qwen2moe",
            _qwen2moe,
            layer={**_ATTENTION, **_AFTER_ATTENTION},
            moe_layer={
                "ffn_gate_inp": "mlp.gate",
                "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
                **_shared("mlp.shared_expert"),
            },
        ),
        Architecture(
            "llama",
            _mixtral,
            layer={**_ATTENTION, **_AFTER_ATTENTION},
            moe_layer={"ffn_gate_inp": "block_sparse_moe.gate"},
            experts=ExpertNames("block_sparse_moe.experts", "w1", "w3", "w2"),
            rope_rows=RopeRows.PAIRS,
        ),
        Architecture(
            "deepseek2",
            _deepseek2,
            layer={**_LATENT_ATTENTION, **_AFTER_ATTENTION},
            dense_layer=_MLP,
            moe_layer={**_BIASED_ROUTER, **_SHARED_EXPERTS},
            optional=frozenset(
                {"attn_q", "attn_q_a", "attn_q_a_norm", "attn_q_b", "exp_probs_b.bias", *_SHARED_EXPERTS}
            ),
        ),
        Architecture(
            "glm4moe",
            _glm4moe,
            layer={**_ATTENTION, **_HEAD_NORMS, "post_attention_norm": "post_attention_layernorm"},
            dense_layer=_MLP,
            moe_layer={**_BIASED_ROUTER, **_SHARED_EXPERTS},
            optional=frozenset({*_HEAD_NORMS, *_SHARED_EXPERTS}),
        ),
        Architecture(
            "minimax-m2",
            _minimax_m2,
            layer={**_ATTENTION, **_HEAD_NORMS, **_AFTER_ATTENTION},
            moe_layer={
                "ffn_gate_inp": "block_sparse_moe.gate",
                "exp_probs_b.bias": "block_sparse_moe.e_score_correction_bias",
            },
            experts=ExpertNames("block_sparse_moe.experts", "w1", "w3", "w2"),
        ),
        Architecture(
            "gpt-oss",
            _gpt_oss,
            layer={
                **_ATTENTION,
                "attn_sinks.weight": "self_attn.sinks",
                "post_attention_norm": "post_attention_layernorm",
            },
            moe_layer={"ffn_gate_inp": "mlp.router"},
        ),
    )
}


def require_architecture(fields: Fields) -> Architecture:
    """The row of a file; raises a KTError in one sentence for a model that cannot be served from one."""
    name, path = fields.file.architecture, fields.file.path
    if name not in ARCHITECTURES:
        raise CheckpointError(
            f"'{path}' is of the architecture {name!r}, which cannot be served from a GGUF file alone; known "
            f"are {', '.join(ARCHITECTURES)}: give --model-path the directory of the original model, and the "
            "file as --kt-weight-path."
        )
    row = ARCHITECTURES[name]
    without = sorted(set(range(fields.layers)) - set(fields.moe_layers))
    if without and not row.dense_layer:
        raise CheckpointError(
            f"'{path}' has no experts in the layers {without}, expected experts in every layer of a model of "
            f"the architecture {name}; download it again."
        )
    return row
