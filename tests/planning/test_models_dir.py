"""A model must be found where the user put it, and half a download must not be taken for a model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kt_kernel.errors import ConfigurationError
from kt_kernel.planning import models_dir
from kt_kernel.planning.models_dir import LocalModels, find_model, write_local_models


@pytest.fixture(autouse=True)
def empty_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No settings and no cache of the person who runs the tests."""
    for name in ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def make_model(directory: Path, *, parts: int = 1, present: int = 1) -> Path:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    names = [f"model-{part}.safetensors" for part in range(parts)]
    index = {"weight_map": {f"tensor{part}": name for part, name in enumerate(names)}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in names[:present]:
        (directory / name).write_bytes(b"")
    return directory


def in_hub_cache(cache: Path, hub_id: str, **files: int) -> Path:
    repository = cache / ("models--" + hub_id.replace("/", "--"))
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc123\n")
    return make_model(repository / "snapshots" / "abc123", **files)


def test_nothing_is_found_in_an_empty_home():
    assert find_model("Qwen/Qwen3-30B-A3B") is None


def test_hub_cache_is_found_where_the_hub_keeps_it(empty_home, monkeypatch):
    expected = in_hub_cache(empty_home / "cache" / "huggingface" / "hub", "Qwen/Qwen3-30B-A3B")
    assert find_model("Qwen/Qwen3-30B-A3B") == expected
    monkeypatch.setenv("HF_HUB_CACHE", str(empty_home / "elsewhere"))
    assert find_model("Qwen/Qwen3-30B-A3B") is None


def test_interrupted_download_is_no_model(empty_home):
    in_hub_cache(empty_home / "cache" / "huggingface" / "hub", "Qwen/Qwen3-30B-A3B", parts=3, present=2)
    assert find_model("Qwen/Qwen3-30B-A3B") is None


@pytest.mark.parametrize("place", ["Qwen3-30B-A3B", "Qwen/Qwen3-30B-A3B"])
def test_folder_may_be_flat_or_have_organisations(empty_home, place):
    expected = make_model(empty_home / "models" / place)
    write_local_models(LocalModels(folders=[str(empty_home / "models")]))
    assert find_model("Qwen/Qwen3-30B-A3B") == expected


def test_list_comes_back_as_written(empty_home):
    local = LocalModels({"mine": "/data/mine"}, ["/data"])
    assert models_dir.read_local_models() == LocalModels()
    assert write_local_models(local) == empty_home / "config" / "kt-kernel" / "local_models.json"
    assert models_dir.read_local_models() == local
    assert find_model("mine") == Path("/data/mine")


@pytest.mark.parametrize("content", ["{", "[]", '{"models": 3}'])
def test_damaged_list_is_one_sentence(content):
    write_local_models(LocalModels()).write_text(content)
    with pytest.raises(ConfigurationError, match=r"local_models\.json cannot be read"):
        find_model("mine")
