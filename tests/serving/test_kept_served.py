"""Quantised dense layers kept as they are, through the real server in bfloat16: it says what the model says,
and they take less memory than decoded ones.
"""

from __future__ import annotations

from pathlib import Path

import tiny_models
import tiny_quantised
import torch
from agreement import Agreement, compare, served_continuation, served_prompt
from gguf_decoded import write_decoded
from gguf_mixed import write_mixed
from gguf_published import VOCABULARY, write_published
from safetensors.torch import load_file
from server import kt_options, serving
from texts import ENGLISH
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

OPTIONS = ("--dtype", "bfloat16", "--max-total-tokens", "4096")
TOKENS = 900


def served(model: Path, ids: list[int], log: Path, reference: Path) -> tuple[Agreement, dict]:
    """How the server agrees with transformers on `reference` in float32, and what it reports of dense
    layers."""
    with serving(model, log, *kt_options(model), *OPTIONS) as server:
        answers = served_prompt(server, ids), served_continuation(server, ids[:40], 16)
        report = server.report()["dense"]
    decoded = AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32).eval()
    return compare(decoded, *answers), report


def test_float8_blocks(tmp_path):
    path = tiny_quantised.build("minimax-m2", tmp_path / "model")
    ids = AutoTokenizer.from_pretrained(path / "served")(ENGLISH).input_ids[:TOKENS]
    agreement, dense = served(path / "served", ids, tmp_path / "log", path / "decoded")
    assert agreement.decided > 300
    assert agreement.holds_in_16_bits(), str(agreement)
    assert dense["formats"] == {"FP8": 16}
    assert dense["bytes"] < 0.6 * dense["decoded_bytes"]


def test_a_gguf_file_that_mixes_types(tmp_path):
    checkpoint = tiny_models.build("qwen3_moe", tmp_path / "checkpoint", vocab_size=VOCABULARY)
    tensors, config = load_file(checkpoint / "model.safetensors"), AutoConfig.from_pretrained(checkpoint)
    plain = write_published("qwen3moe", config, tensors, tmp_path / "plain.gguf")
    file = write_mixed(plain, tmp_path / "mixed.gguf")
    ids = [token % VOCABULARY for token in ENGLISH.encode()[:TOKENS]]
    agreement, dense = served(file, ids, tmp_path / "log", write_decoded(file, tmp_path / "decoded"))
    assert agreement.decided > 300
    assert agreement.holds_for_int8(), str(agreement)
    assert dense["formats"] == {"Q4_K": 8, "Q6_K": 5, "Q5_K": 4}
    assert dense["bytes"] < 0.4 * dense["decoded_bytes"]
