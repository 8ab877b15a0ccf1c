"""`kt model`: downloads go on where they stopped, damage is found, and only what kt downloaded is removed."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch
from fake_hub import COMMIT, FakeHub, running
from huggingface_hub import constants
from safetensors.torch import save_file
from typer.testing import CliRunner

from kt_kernel.cli.main import app
from kt_kernel.cli.models import records
from kt_kernel.planning.models_dir import find_model

REPOSITORY = "someone/tiny-moe"
CONFIG = {"model_type": "qwen3_moe", "num_experts": 4}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Settings and cache of this test alone."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    return tmp_path


def checkpoint(folder: Path) -> Path:
    """Two weight files with an index."""
    folder.mkdir(parents=True)
    weights = {}
    for number in (1, 2):
        name = f"model-0000{number}-of-00002.safetensors"
        save_file({f"w{number}": torch.full((64, 16), float(number))}, folder / name)
        weights[f"w{number}"] = name
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    source = checkpoint(tmp_path / "source")
    files = {path.name: path.read_bytes() for path in source.iterdir()} | {"README.md": b"# Tiny\n"}
    with running(FakeHub(REPOSITORY, files)) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub


def kt(*arguments: object, answer: str = ""):
    return CliRunner().invoke(app, ["model", *map(str, arguments)], input=answer)


def succeeds(*arguments: object) -> str:
    result = kt(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def fails(*arguments: object) -> str:
    result = kt(*arguments)
    assert result.exit_code == 1, result.output
    return result.output


def one_sentence(*arguments: object) -> str:
    result = kt(*arguments)
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("kt: ") and len(result.stderr.splitlines()) == 1
    return result.stderr


# ---- download ----------------------------------------------------------------------------------


def test_a_downloaded_model_is_listed_verified_found_by_name_and_removed(hub, home):
    shown = succeeds("download", REPOSITORY)
    assert "5 files" in shown and "0 B of it here" in shown and "free" in shown
    snapshot = find_model(REPOSITORY)
    assert snapshot is not None and (snapshot / "config.json").read_bytes() == hub.files["config.json"]
    assert "ready" in succeeds("list") and REPOSITORY in succeeds("list")
    assert "5 files are as recorded, 0 recorded now" in succeeds("verify", REPOSITORY)
    assert "is removed" in succeeds("remove", REPOSITORY, "--yes")
    assert not snapshot.exists() and find_model(REPOSITORY) is None
    assert not any(path.is_file() for path in (home / "hub").rglob("blobs/*"))


def test_a_download_that_broke_off_goes_on_where_it_was(hub, home, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 256)  # what it keeps of a broken connection
    hub.breaks_after = 1024
    folder = home / "model"
    succeeds("download", REPOSITORY, "--to", folder)  # huggingface-hub tries again by itself
    assert "bytes=1024-" in [wanted for _, _, wanted in hub.requests], "everything was fetched anew"
    assert "5 files are as recorded" in succeeds("verify", folder)


def test_files_that_are_here_are_not_fetched_again(hub, home):
    succeeds("download", REPOSITORY)
    hub.requests.clear()
    assert "0 B of it here" not in succeeds("download", REPOSITORY)
    assert hub.served() == []


def test_patterns_choose_files(hub, home):
    folder = home / "part"
    succeeds("download", REPOSITORY, "--to", folder, "--include", "*.json", "--exclude", "*.index.json")
    assert hub.served() == ["config.json"]
    assert "has no file that" in one_sentence("download", REPOSITORY, "--include", "*.bin")


def test_a_configured_folder_takes_the_download(hub, home):
    CliRunner().invoke(app, ["config", "set", "download-folder", str(home / "models")])
    succeeds("download", REPOSITORY)
    assert find_model(REPOSITORY) == home / "models" / REPOSITORY
    succeeds("remove", REPOSITORY, "--yes")
    assert not (home / "models" / REPOSITORY).exists()


def test_a_full_disk_is_noticed_before_the_download(hub, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1000))
    sentence = one_sentence("download", REPOSITORY)
    assert "GB free" in sentence and "--to" in sentence
    assert hub.served() == []


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("someone/else", (), "has no repository someone/else"),
        (REPOSITORY, ("--revision", "v9"), "no revision 'v9'"),
        ("a/b/c", (), "no name of a repository"),
    ],
)
def test_what_the_hub_does_not_have_is_one_sentence(hub, name, options, expected):
    assert expected in one_sentence("download", name, *options)


def test_a_hub_that_cannot_be_reached_is_one_sentence(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "cannot be fetched from http://127.0.0.1:9" in one_sentence("download", REPOSITORY)


def test_a_second_place_takes_the_name_and_the_first_keeps_its_files(hub, home):
    one, two = home / "one", home / "two"
    succeeds("download", REPOSITORY, "--to", one)
    said = succeeds("download", REPOSITORY, "--to", two)
    assert f"{REPOSITORY} was {one}, whose files stay" in said
    assert find_model(REPOSITORY) == two and (one / "config.json").exists()


def test_files_of_the_user_are_not_overwritten(hub, home):
    folder = home / "model"
    folder.mkdir()
    own = {"README.md": b"# Mine\n", "config.json": b"{}", "notes.txt": b"mine"}
    for name, content in own.items():
        (folder / name).write_bytes(content)
    sentence = one_sentence("download", REPOSITORY, "--to", folder)
    assert "README.md" in sentence and "config.json" in sentence and "notes.txt" not in sentence
    assert "--to" in sentence and hub.served() == []
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == own


def test_a_changed_file_that_kt_fetched_is_fetched_again(hub, home):
    folder = home / "model"
    succeeds("download", REPOSITORY, "--to", folder)
    file = folder / "model-00002-of-00002.safetensors"
    file.write_bytes(b"cut off")
    os.utime(file, (time.time() + 10,) * 2)  # huggingface-hub trusts its notes on files older than they are
    succeeds("download", REPOSITORY, "--to", folder)
    assert file.read_bytes() == hub.files[file.name]


# ---- verify ------------------------------------------------------------------------------------


def test_one_changed_byte_is_found_by_its_checksum(hub, home):
    folder = home / "model"
    succeeds("download", REPOSITORY, "--to", folder)
    file = folder / "model-00002-of-00002.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert "sound" in succeeds("verify", folder, "--quick")
    assert "model-00002-of-00002.safetensors has changed: sha256:" in fails("verify", folder)


def test_a_model_from_elsewhere_is_recorded_once_and_compared_later(home):
    folder = checkpoint(home / "mine")
    assert "0 files are as recorded, 4 recorded now" in succeeds("verify", folder)
    assert "4 files are as recorded, 0 recorded now" in succeeds("verify", folder)
    (folder / "config.json").write_text("{}")
    assert "config.json has 2 bytes" in fails("verify", folder)


@pytest.mark.parametrize("depth", [(), ("--quick",)])
def test_cut_and_missing_files_are_named(home, depth):
    folder = checkpoint(home / "mine")
    (folder / "model-00001-of-00002.safetensors").unlink()
    second = folder / "model-00002-of-00002.safetensors"
    second.write_bytes(second.read_bytes()[:-8])
    said = fails("verify", folder, *depth)
    assert "model-00001-of-00002.safetensors is missing" in said
    assert "model-00002-of-00002.safetensors" in said and "cut off" in said
    assert records.read_records() == {}, "a damaged model's checksums are worth nothing"


def test_a_damaged_gguf_file_is_named(home):
    (home / "x.gguf").write_bytes(b"GGUF\3\0\0\0")
    assert "x.gguf" in fails("verify", home / "x.gguf", "--quick")


# ---- info --------------------------------------------------------------------------------------


def test_info_says_what_the_headers_say(demo_checkpoint):
    shown = succeeds("info", demo_checkpoint)
    assert "mixtral (MixtralForCausalLM)" in shown and "experts BF16" in shown
    assert "30 have 8 routed experts each" in shown and "kernel" in shown
    assert max(map(len, shown.splitlines())) <= 80
    found = json.loads(succeeds("info", demo_checkpoint, "--json"))
    # 30 layers of 8 experts with three matrices of 576 x 192 in 16 bits.
    assert found["facts"]["expert_bytes"] == 30 * 8 * 3 * 576 * 192 * 2
    assert found["kernels"][0][0] == "BF16"


def test_info_of_a_model_that_is_not_here_says_so(home):
    shown = succeeds("info", "deepseek-ai/DeepSeek-V3.1")
    assert "not on this machine: kt model download deepseek-ai/DeepSeek-V3.1" in shown
    assert "no file was read" in shown and "experts FP8" in shown
    assert "There is no" in one_sentence("info", "no-such-model")


# ---- names -------------------------------------------------------------------------------------


def test_models_below_a_folder_are_found_and_named(home):
    checkpoint(home / "models" / "org" / "one")
    for name in ("two-00001-of-00002.gguf", "two-00002-of-00002.gguf", "three.gguf"):
        (home / "models" / name).write_bytes(b"GGUF")
    found = succeeds("scan", home / "models")
    assert "org/one" in found and "three.gguf" in found and "two-00001-of" in found
    assert "two-00002-of" not in found
    succeeds("scan", home / "models", "--add")
    assert find_model("one") == home / "models" / "org" / "one"
    assert find_model("three") == home / "models" / "three.gguf"


def test_a_name_stands_for_one_model(home):
    one, two = checkpoint(home / "one"), checkpoint(home / "two")
    succeeds("add", "mine", one)
    assert "already the name of" in one_sentence("add", "mine", two)
    assert "no complete model" in one_sentence("add", "other", home / "nothing")
    assert "files in" in succeeds("remove", "mine") and one.exists()
    assert find_model("mine") is None


def test_folders_of_the_settings_are_listed(home):
    checkpoint(home / "models" / "one")
    CliRunner().invoke(app, ["config", "set", "model-folders", str(home / "models")])
    table = succeeds("list")
    assert "one" in table and "ready" in table
    assert max(map(len, table.splitlines())) <= 80


def test_no_models_at_all_says_what_to_do(home):
    assert "kt model download" in succeeds("list")


# ---- remove ------------------------------------------------------------------------------------


def test_what_kt_did_not_download_is_not_removed(home):
    folder = checkpoint(home / "mine")
    assert "was not downloaded by kt" in one_sentence("remove", folder, "--yes")
    assert (folder / "config.json").exists()


def test_removing_asks_and_leaves_files_that_were_added(hub, home):
    folder = home / "model"
    succeeds("download", REPOSITORY, "--to", folder)
    (folder / "notes.txt").write_text("mine")
    succeeds("verify", REPOSITORY)  # which records the notes, too
    assert kt("remove", REPOSITORY, answer="n\n").exit_code == 1 and (folder / "config.json").exists()
    assert kt("remove", REPOSITORY, answer="y\n").exit_code == 0
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


def test_files_that_were_already_in_the_cache_are_not_ours(hub, home):
    from huggingface_hub import snapshot_download

    snapshot_download(REPOSITORY, cache_dir=home / "hub", endpoint=hub.url)
    succeeds("download", REPOSITORY)
    assert records.record_of(home / "hub" / "models--someone--tiny-moe" / "snapshots" / COMMIT)
    assert "was not downloaded by kt" in one_sentence("remove", REPOSITORY, "--yes")


@pytest.fixture(params=["delete_files", "older huggingface-hub"])
def any_hub_library(request, monkeypatch):
    """With the library's own removal of single files, and without."""
    if request.param != "delete_files":
        monkeypatch.delattr(huggingface_hub.HFCacheInfo, "delete_files", raising=False)


def test_of_a_cache_begun_by_another_program_only_what_kt_added_is_removed(hub, home, any_hub_library):
    theirs = "model-00001-of-00002.safetensors"
    huggingface_hub.hf_hub_download(REPOSITORY, theirs, cache_dir=home / "hub", endpoint=hub.url)
    succeeds("download", REPOSITORY)
    assert "is removed" in succeeds("remove", REPOSITORY, "--yes")
    repository = home / "hub" / "models--someone--tiny-moe"
    assert [path.name for path in (repository / "snapshots" / COMMIT).iterdir()] == [theirs]
    assert (repository / "snapshots" / COMMIT / theirs).read_bytes() == hub.files[theirs]
    assert len(list((repository / "blobs").iterdir())) == 1
    assert (repository / "refs" / "main").read_text() == COMMIT


def test_content_that_another_revision_has_too_stays(hub, home, any_hub_library):
    succeeds("download", REPOSITORY)
    repository = home / "hub" / "models--someone--tiny-moe"
    other = repository / "snapshots" / COMMIT[::-1]
    other.mkdir()
    link = (repository / "snapshots" / COMMIT / "config.json").readlink()
    (other / "config.json").symlink_to(link)
    succeeds("remove", REPOSITORY, "--yes")
    assert [path.name for path in (repository / "snapshots").iterdir()] == [other.name]
    assert (other / "config.json").read_bytes() == hub.files["config.json"]
    assert len(list((repository / "blobs").iterdir())) == 1
    assert find_model(REPOSITORY) is None


def test_a_damaged_entry_in_the_cache_keeps_nothing_from_being_removed(hub, home):
    succeeds("download", REPOSITORY)
    repository = home / "hub" / "models--someone--tiny-moe"
    other = repository / "snapshots" / COMMIT[::-1]
    other.mkdir()
    (other / "config.json").symlink_to("../../blobs/0123")  # huggingface-hub leaves out the whole repository
    succeeds("remove", REPOSITORY, "--yes")
    assert [path for path in repository.rglob("*") if path.is_file()] == []


def test_of_a_folder_begun_by_another_program_only_what_kt_added_is_removed(hub, home):
    folder, theirs = home / "model", "model-00001-of-00002.safetensors"
    huggingface_hub.hf_hub_download(REPOSITORY, theirs, local_dir=folder, endpoint=hub.url)
    succeeds("download", REPOSITORY, "--to", folder)
    succeeds("download", REPOSITORY, "--to", folder)
    succeeds("remove", REPOSITORY, "--yes")
    assert sorted(path.name for path in folder.iterdir()) == [".cache", theirs]
    assert (folder / ".cache" / "huggingface" / "download" / f"{theirs}.metadata").exists()


def test_what_a_failed_download_left_is_removed_with_the_rest(hub, home, monkeypatch):
    folder, whole = home / "model", huggingface_hub.snapshot_download

    def fails_halfway(repository: str, **options: object) -> None:
        whole(repository, **options | {"allow_patterns": ["*.json"]})
        raise OSError("no route")

    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub, "snapshot_download", fails_halfway)
        assert "no route" in fails("download", REPOSITORY, "--to", folder)
    succeeds("download", REPOSITORY, "--to", folder)
    succeeds("remove", REPOSITORY, "--yes")
    assert not folder.exists()
