"""A miniature of every family must get a plan whose method and sizes are those of its files; a GGUF, too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from miniatures import MINIATURES
from typer.testing import CliRunner

from kt_kernel.cli.main import app
from kt_kernel.machine_limits import Limits
from kt_kernel.planning import checkpoint_facts, this_machine
from kt_kernel.planning.checkpoint_facts import keep_facts, read_facts
from kt_kernel.planning.config_facts import sizes_of_config
from kt_kernel.planning.model_facts import GQA, LINEAR, MLA

# name -> (attention, the parsers that its family gets)
EXPECTED = {
    "deepseek-v3": (MLA, "deepseekv3", None),
    "kimi-k2-thinking": (MLA, "deepseekv3", None),  # its configuration says no more
    "glm-4.7-fp8": (GQA, "glm45", "glm45"),
    "minimax-m2": (GQA, "minimax-m2", "minimax-append-think"),
    "qwen3-next": (LINEAR, "qwen25", None),
    "gpt-oss-20b": (GQA, "gpt-oss", "gpt-oss"),
    "mixtral": (GQA, None, None),
    "qwen3-30b-a3b": (GQA, "qwen25", "qwen3"),
}


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    # Half a second each, and longer where other programs run.
    monkeypatch.setattr(this_machine, "measure", lambda native, threads: Limits(30e9, 4e11, 8e11))


def planned(folder: Path, *options: str) -> dict:
    result = CliRunner().invoke(app, ["run", str(folder), "--dry-run", "--json", *options])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.mark.parametrize("name", MINIATURES)
def test_every_miniature_gets_a_plan(name, tmp_path):
    miniature = MINIATURES[name]
    folder = miniature.write(tmp_path / "model")
    made = planned(folder)
    assert "no_plan" not in made, made
    facts, config = made["facts"], json.loads((folder / "config.json").read_text())
    assert facts["method"] == miniature.method
    assert facts["has_biases"] == (config["model_type"] == "gpt_oss")
    sizes = sizes_of_config(config)
    assert facts["sizes"]["experts"] == sizes.experts > 1
    assert facts["sizes"]["moe_layers"] <= sizes.layers
    total = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert 0.9 * total < facts["expert_bytes"] + facts["dense_bytes"] <= total
    experts = facts["sizes"]["moe_layers"] * sizes.experts * sizes.expert_parameters
    # From 4 bits to 16 a weight, and scales; tiny matrices pad.
    assert 0.5 * experts <= facts["expert_bytes"] <= 2.4 * experts
    if name in EXPECTED:
        attention, tools, reasoning = EXPECTED[name]
        assert facts["sizes"]["attention"] == attention
        assert made["flags"].get("--tool-call-parser", [None])[0] == tools
        assert made["flags"].get("--reasoning-parser", [None])[0] == reasoning
    assert made["decode"]["tokens_per_second"] > 0


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory) -> Path:
    return MINIATURES["mixtral"].write(tmp_path_factory.mktemp("model") / "mixtral")


def test_facts_are_read_again_only_when_files_change(mixtral, monkeypatch):
    first = read_facts(mixtral)
    keep_facts(mixtral, first)
    monkeypatch.setattr(checkpoint_facts, "_from_headers", lambda *paths: pytest.fail("read again"))
    assert read_facts(mixtral) == first
    config = mixtral / "config.json"
    config.write_text(config.read_text() + " ")
    with pytest.raises(pytest.fail.Exception, match="read again"):
        read_facts(mixtral)


def test_experts_of_another_folder_count(mixtral, tmp_path):
    other = MINIATURES["qwen3-30b-a3b"].write(tmp_path / "other")
    facts = read_facts(mixtral, other)
    assert facts.expert_bytes == read_facts(other).expert_bytes
    assert facts.dense_bytes == read_facts(mixtral).dense_bytes


def test_gguf_file_gets_a_plan(tmp_path):
    from gguf_published import MODELS, published_tensors, random_model, write_published

    model = random_model("qwen3moe")
    tensors = published_tensors(model, tmp_path / "published")
    file = write_published(MODELS["qwen3moe"].architecture, model.config, tensors, tmp_path / "m.gguf")
    facts = planned(file)["facts"]
    assert (facts["container"], facts["method"]) == ("GGUF", "LLAMAFILE")
    assert facts["sizes"]["experts"] == model.config.num_experts
    assert 0.5 * file.stat().st_size < facts["expert_bytes"] + facts["dense_bytes"] <= file.stat().st_size
    # The server, not the plan, says what a file lacks.
    file.write_bytes(file.read_bytes().replace(b"token_embd.weight", b"token_none.weight"))
    planned(file)


def test_converted_experts_are_planned_as_what_they_are(mixtral, tmp_path):
    result = CliRunner().invoke(app, ["quant", str(mixtral), "--output", str(tmp_path / "int4")])
    assert result.exit_code == 0, result.output
    made = planned(mixtral, "--kt-weight-path", str(tmp_path / "int4"))
    assert made["facts"]["method"] == "AMXINT4"
    assert made["facts"]["expert_bytes"] < 0.4 * read_facts(mixtral).expert_bytes
