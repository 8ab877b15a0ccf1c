"""Does training keep its memory? Thousands of steps of a tiny random model, and what its process has.

    python bench/training_soak.py --steps 5000

Ends with status 1 if the process has grown by more than --most MiB after the first tenth of the steps.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import kt_kernel.training as training

_MIB = 1 << 20
_CONFIG = Qwen3MoeConfig(
    vocab_size=256,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    intermediate_size=64,
    moe_intermediate_size=32,
    num_experts=8,
    num_experts_per_tok=2,
    max_position_embeddings=256,
)


def model_of(folder: Path, trained: str, threads: int) -> torch.nn.Module:
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(_CONFIG).to(torch.bfloat16).save_pretrained(folder)
    model = training.load(
        AutoModelForCausalLM, folder, train_experts=trained, dtype=torch.float32, threads=threads
    )
    if trained == "lora":
        config = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=["q_proj", "v_proj"])
        model = get_peft_model(model, training.lora_config(config, experts=True))
    return model.train()


def memory_of_steps(model: torch.nn.Module, steps: int) -> Iterator[int]:
    """Bytes of the process after each step. Batches have from 4 to 24 tokens, so that sizes change."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4)
    process = psutil.Process()
    for step in range(steps):
        ids = torch.randint(_CONFIG.vocab_size, (1, 4 + step % 21), generator=generator)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 100 == 0:
            gc.collect()
        yield process.memory_info().rss


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--trained", choices=("lora", "full"), default="lora")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--most", type=int, default=8, help="MiB")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    begin, warm = time.monotonic(), arguments.steps // 10
    with tempfile.TemporaryDirectory() as folder:
        model = model_of(Path(folder), arguments.trained, arguments.threads)
        start = last = 0
        for step, last in enumerate(memory_of_steps(model, arguments.steps), 1):
            if step == warm:
                start = last
            if step % max(1, warm) == 0:
                print(f"step {step}: {last / _MIB:.1f} MiB", flush=True)
    grown = (last - start) / _MIB
    print(f"{arguments.steps} steps in {time.monotonic() - begin:.0f} s, grown by {grown:.1f} MiB")
    return int(grown > arguments.most)


if __name__ == "__main__":
    sys.exit(main())
