"""A file alone, through the real server: it says what the model says that the file was made from.

The dense layers in 16 bits, the experts in Q8_0 with int8 inputs, as they are served by default.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gguf
import pytest
import tiny_models
import torch
from agreement import compare, served_continuation, served_prompt
from gguf_published import USUAL, with_rounded_experts, write_published
from safetensors.torch import load_file, save_file
from server import serving
from texts import ENGLISH
from transformers import AutoConfig, AutoModelForCausalLM

OPTIONS = ("--kt-cpuinfer", "2", "--dtype", "float32")


@dataclass(frozen=True)
class Case:
    """`family` of tiny_models.py; `path`: what is given to the server, made from the written file."""

    family: str
    architecture: str
    options: tuple[str, ...]
    path: Callable[[Path], Path]


def split(file: Path) -> Path:
    """The same model in parts; the name of the first."""
    stem = file.with_name("part")
    reader = gguf.GGUFReader(file)
    writer = gguf.GGUFWriter(
        stem, reader.get_field("general.architecture").contents(), split_max_tensors=30, split_max_size=0
    )
    for key, field in reader.fields.items():
        if not key.startswith(("GGUF.", "general.architecture")):
            kind = field.types[0]
            writer.add_key_value(
                key, field.contents(), kind, field.types[-1] if len(field.types) > 1 else None
            )
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_shape=tensor.data.shape, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file.unlink()
    return min(file.parent.glob("part-*.gguf"))


CASES = {
    "interleaved rows of RoPE, in parts, experts on the device": Case(
        "mixtral", "llama", ("--kt-num-gpu-experts", "3"), split
    ),
    "halves of latent attention, yarn, a biased router": Case(
        "deepseek_v3", "deepseek2", (), lambda file: file
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_the_served_file_is_the_model(case, tmp_path):
    checkpoint = tiny_models.build(case.family, tmp_path / "checkpoint")
    tensors = load_file(checkpoint / "model.safetensors")
    (tmp_path / "gguf").mkdir()
    written = tmp_path / "gguf" / "model.gguf"
    write_published(case.architecture, AutoConfig.from_pretrained(checkpoint), tensors, written)
    save_file(
        with_rounded_experts(tensors, USUAL.expert_kind), checkpoint / "model.safetensors", {"format": "pt"}
    )
    reference = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    environment = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    ids = list(ENGLISH.encode())[:1500]
    ids = [token % tiny_models.VOCABULARY for token in ids]
    with serving(
        case.path(written), tmp_path / "log", *case.options, *OPTIONS, environment=environment
    ) as server:
        agreement = compare(reference, served_prompt(server, ids), served_continuation(server, ids[:40], 16))
        assert agreement.decided > 300
        assert agreement.holds_for_int8(), str(agreement)
        assert server.post("/v1/completions", model="Tiny Model", prompt="he", max_tokens=1)["choices"]
    assert "method LLAMAFILE" in server.log_text()
    assert _bytes_in(tmp_path / "cache") < 1 << 20  # no copy of any weight


def _bytes_in(directory: Path) -> int:
    return sum(entry.stat().st_size for entry in directory.rglob("*") if entry.is_file())
