"""A server of one GGUF file that others wrote, dense layers, tokenizer and experts, is the model in it."""

from __future__ import annotations

from pathlib import Path

import torch
from gguf_decoded import write_decoded
from transformers import AutoModelForCausalLM

from kt_kernel import demo

TESTS = Path(__file__).resolve().parents[1]

from agreement import compare, served_continuation, served_prompt  # noqa: E402
from patched import PROMPT  # noqa: E402
from server import kt_options, serving  # noqa: E402

OPTIONS = ("--dtype", "float32")


def test_another_files_blocks_answer_as_its_dense_model(demo_gguf, tmp_path):
    """Its head is the embedding, which SGLang's models do not know."""
    environment = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    options = (*kt_options(demo_gguf), *OPTIONS)
    with serving(demo_gguf, tmp_path / "log", *options, environment=environment) as server:
        ids = list(range(1000, 1200))
        served = served_prompt(server, ids), served_continuation(server, ids[:40], 24)
    result = compare(demo.load_dense_model(torch.float32), *served)
    print(result)
    assert result.holds_for_int8(), str(result)


def test_another_projects_quantised_file_is_what_its_blocks_mean(quantised_gguf, tmp_path):
    file = quantised_gguf("TINY", "Q4_K_M")
    environment = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    with serving(file, tmp_path / "log", *kt_options(file), *OPTIONS, environment=environment) as server:
        served = served_prompt(server, PROMPT), served_continuation(server, PROMPT[:40], 24)
    decoded = write_decoded(file, tmp_path / "decoded")
    reference = AutoModelForCausalLM.from_pretrained(decoded, dtype=torch.float32).eval()
    result = compare(reference, *served)
    print(result)
    assert result.holds_for_int8(), str(result)
