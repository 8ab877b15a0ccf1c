"""`kt run FILE.gguf`, and what SGLang's options become for a model path that is a GGUF file."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from gguf_published import MODELS, published_tensors, random_model, write_published
from typer.testing import CliRunner

from kt_kernel.cli import run
from kt_kernel.cli.machine import Machine
from kt_kernel.cli.main import app
from kt_kernel.cli.model import local_model
from kt_kernel.demo.gguf_source import find_source
from kt_kernel.errors import CheckpointError
from kt_kernel.gguf_model import described_file
from kt_kernel.integrations.sglang.model_file import serve_description


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    model = random_model("qwen3moe")
    tensors = published_tensors(model, folder / "published")
    (folder / "model").mkdir()
    path = folder / "model" / "tiny-q8.gguf"
    return write_published(MODELS["qwen3moe"].architecture, model.config, tensors, path)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_kt_run_serves_a_file_under_its_own_name(file):
    command = run.server_command(local_model(str(file)), Machine(2, [0]), [])
    given = dict(itertools.pairwise(command))
    assert given["--model-path"] == given["--kt-weight-path"] == str(file)
    assert given["--served-model-name"] == "Tiny Model"


def test_kt_run_takes_the_file_in_a_directory(file):
    assert local_model(str(file.parent)).path == file.parent
    assert local_model(str(file.parent)).served_name == "Tiny Model"


def test_kt_run_refuses_a_dense_file_in_one_sentence():
    result = CliRunner().invoke(app, ["run", str(find_source().path), "--dry-run"])
    assert result.exit_code == 1
    assert result.stderr.startswith("kt: ")
    assert "has no experts in it: kt-kernel serves mixture-of-experts models." in result.stderr


def test_sglang_gets_a_description_and_our_experts_the_file(file):
    arguments = {"model_path": str(file), "kt_cpuinfer": 2, "served_model_name": None, "load_format": "gguf"}
    serve_description(arguments)
    assert described_file(arguments["model_path"]) == file
    assert (Path(arguments["model_path"]) / "config.json").exists()
    assert arguments["kt_weight_path"] == str(file)
    assert arguments["served_model_name"] == "Tiny Model"
    assert arguments["load_format"] == "auto"


def test_what_the_user_said_stays(file, tmp_path):
    arguments = {"model_path": str(file), "kt_weight_path": str(tmp_path), "served_model_name": "mine"}
    serve_description(arguments)
    assert arguments["kt_weight_path"] == str(tmp_path)
    assert arguments["served_model_name"] == "mine"


@pytest.mark.parametrize("method", [{"kt_method": "AUTO"}, {"kt_method": "LLAMAFILE"}])
def test_naming_the_method_is_asking_for_cpu_experts(file, method):
    arguments = {"model_path": str(file), **method}
    serve_description(arguments)
    assert arguments["kt_weight_path"] == str(file)


def test_without_any_flag_of_ours_the_file_is_sglangs(file):
    arguments = {"model_path": str(file), "kt_method": None, "load_format": "gguf"}
    before = dict(arguments)
    serve_description(arguments)
    assert arguments == before


def test_a_directory_of_another_kind_is_left_alone(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    arguments = {"model_path": str(tmp_path), "kt_weight_path": str(tmp_path)}
    before = dict(arguments)
    serve_description(arguments)
    assert arguments == before


def test_a_file_that_cannot_be_served_is_refused_before_sglang_sees_it():
    with pytest.raises(CheckpointError, match="has no experts in it"):
        serve_description({"model_path": str(find_source().path), "kt_cpuinfer": 2})
