"""What int8 activations in dense layers cost a real model: perplexity, as bench/accuracy.py has it.

The model is SmolLM2-135M-Instruct as its GGUF file has it; every matrix of attention and MLPs, and the head,
is multiplied as the file stores it, with inputs rounded to bf16 or int8. All else is transformers' own in
fp32.

    python bench/dense_accuracy.py --tokens 16384
"""

from __future__ import annotations

import argparse
from collections import Counter

import torch
from accuracy import losses, per_cent_above, perplexity, windows
from torch import nn
from transformers import LlamaForCausalLM

from kt_kernel import kt_kernel_ext, operators
from kt_kernel.demo import load_dense_model
from kt_kernel.demo.gguf_source import find_source
from kt_kernel.engine import get_engine
from kt_kernel.formats.dense_matrix import DenseMatrix
from kt_kernel.gguf.model import GgufModel, open_gguf
from kt_kernel.gguf_model.dense import half_split_rows
from kt_kernel.gguf_model.stored import block_matrix

_LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class Kept(nn.Module):
    """A linear layer on the product's kernels."""

    def __init__(self, matrix: DenseMatrix, activations: str, threads: int) -> None:
        super().__init__()
        engine = get_engine(threads, 1)
        operators.install(engine)
        part = matrix.as_part()
        self.linear = kt_kernel_ext.Linear(engine, k=matrix.columns, parts=[part], activations=activations)
        self.handle = self.linear.handle

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.kt_kernel.linear(self.handle, x, None)


def matrices(file: GgufModel, model: LlamaForCausalLM) -> dict[str, DenseMatrix]:
    """Module of the model -> its matrix in the file; the head is the embedding."""
    config = model.config
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    found = {"lm_head": _matrix(file, "token_embd.weight", None)}
    for layer in range(config.num_hidden_layers):
        for stem, module in _LAYER.items():
            name = f"blk.{layer}.{stem}.weight"
            found[f"model.layers.{layer}.{module}"] = _matrix(file, name, heads.get(stem))
    return found


def _matrix(file: GgufModel, name: str, heads: int | None) -> DenseMatrix:
    """Rows of `heads` are stored in RoPE's pairs."""
    rows = file.view(name)
    blocks = rows if heads is None else half_split_rows(rows, heads)
    return block_matrix(name, blocks, file.info(name).type, release=lambda: None)


def replace(model: LlamaForCausalLM, layers: dict[str, nn.Module]) -> None:
    for name, layer in layers.items():
        model.set_submodule(name, layer)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=4096, help="default: %(default)s; whole windows count")
    parser.add_argument("--threads", type=int, default=kt_kernel_ext.topology()["physical_cores"])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model, text = load_dense_model(torch.float32), windows(arguments.tokens)
    found = matrices(open_gguf(find_source().path), model)
    print(dict(Counter(matrix.format for matrix in found.values())), f"{text.numel()} tokens")
    for name, matrix in found.items():
        model.get_submodule(name).weight = nn.Parameter(matrix.numbers(torch.float32), requires_grad=False)
    exact = losses(model, text)
    print(f"decoded to fp32: perplexity {perplexity(exact):.3f}")
    for activations in ("bf16", "int8"):
        replace(model, {name: Kept(m, activations, arguments.threads) for name, m in found.items()})
        each = losses(model, text)
        above, error = per_cent_above(each, exact)
        print(f"kept, {activations}: perplexity {perplexity(each):.3f}, {above:+.2f} ± {error:.2f} % above")


if __name__ == "__main__":
    main()
