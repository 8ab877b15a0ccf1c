"""The agreement of test_gguf_agreement.py on files of a gigabyte, with Qwen3-30B-A3B's real shapes.

    python tests/gguf_files/recorded_agreement.py DIRECTORY [--kind Q4_K_M ...] [--layers 3]

Needs ik_llama.cpp's quantiser (bench/ik_llama.py), 20 GB of disk and 16 GB of memory; files that exist are
taken. doc/gguf.md has what it printed.
"""

from __future__ import annotations

import argparse
import gc
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import torch
from gguf_decoded import write_decoded
from gguf_qwen3_moe import REAL, write_importance_of, write_qwen3_moe
from transformers import AutoModelForCausalLM

TESTS = Path(__file__).resolve().parents[1]
sys.path += [str(TESTS / "serving"), str(TESTS / "transformers"), str(TESTS.parent / "bench")]

import ik_llama  # noqa: E402
from patched import agreement, load  # noqa: E402
from test_gguf_agreement import KINDS  # noqa: E402


def quantised(directory: Path, layers: int, kind: str) -> Path:
    source, importance = directory / f"source-{layers}.gguf", directory / f"importance-{layers}.dat"
    target = directory / f"qwen3-{layers}-{kind}.gguf"
    size = replace(REAL, layers=layers)
    if not target.exists():
        if not source.exists():
            write_qwen3_moe(source, size)
        ik_llama.quantise(source, target, kind, importance=write_importance_of(importance, size))
    return target


def compare(file: Path, kind: str) -> None:
    decoded = write_decoded(file, file.with_suffix(".decoded"))
    try:
        reference = AutoModelForCausalLM.from_pretrained(decoded, dtype=torch.float32).eval()
        for activations in ("bf16", "auto"):
            model = load(decoded, weight_path=file, method="LLAMAFILE", activations=activations)
            result = agreement(model, reference)
            del model
            gc.collect()
            print(f"{kind}, {file.stat().st_size / 1e9:.2f} GB, {activations}: {result}", flush=True)
    finally:
        shutil.rmtree(decoded)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("--kind", action="append", help=f"default: {', '.join(KINDS)}")
    parser.add_argument("--layers", type=int, default=REAL.layers)
    arguments = parser.parse_args()
    arguments.directory.mkdir(parents=True, exist_ok=True)
    for kind in arguments.kind or KINDS:
        compare(quantised(arguments.directory, arguments.layers, kind), kind)


if __name__ == "__main__":
    main()
