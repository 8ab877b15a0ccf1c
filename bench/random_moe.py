"""A checkpoint of Qwen3-MoE's shape with random weights, whose logits are as spread as a trained model's."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers

SEED = 0


@dataclass(frozen=True)
class Size:
    hidden: int
    intermediate: int  # of one expert
    experts: int
    top_k: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    @property
    def expert_bytes(self) -> int:
        """Of all experts in bfloat16."""
        return self.layers * self.experts * 3 * self.hidden * self.intermediate * 2


# Layers of Qwen3-30B-A3B with half of its experts.
LARGE = Size(2048, 768, 64, 8, layers=8, heads=32, kv_heads=4, head_dim=128, vocabulary=8192)
SMALL = Size(256, 128, 16, 4, layers=4, heads=4, kv_heads=2, head_dim=64, vocabulary=512)


def write_checkpoint(path: Path, size: Size, device: torch.device) -> bool:
    """Write the model to `path`, made on `device`; False if it is there already."""
    stamp, described = path / "kt_bench.json", json.dumps(asdict(size))
    if stamp.exists() and stamp.read_text() == described:
        return False
    with torch.device("meta"):
        model = transformers.Qwen3MoeForCausalLM(_config(size))
    model = model.to(torch.bfloat16).to_empty(device=device)
    torch.manual_seed(SEED)
    _randomise(model)
    model.save_pretrained(path)
    stamp.write_text(described)
    return True


def _config(size: Size) -> transformers.Qwen3MoeConfig:
    return transformers.Qwen3MoeConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.hidden,
        moe_intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        head_dim=size.head_dim,
        num_experts=size.experts,
        num_experts_per_tok=size.top_k,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        max_position_embeddings=32768,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )


# What differs from "every matrix keeps the size of what it multiplies". Experts are averaged, and must matter
# all the same; a router that is sure of its choice keeps rounding from changing it, as training does.
_FACTORS = {"experts.down_proj": 2.0, "gate.weight": 4.0, "lm_head.weight": 3.0}


@torch.no_grad()
def _randomise(model: torch.nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_(1)
            continue
        factor = next((factor for end, factor in _FACTORS.items() if name.endswith(end)), 1.0)
        inputs = 1 if "embed_tokens" in name else parameter.shape[-1]
        parameter.normal_(0, factor * inputs**-0.5)
