"""Files that the tests of this folder share, built on first use."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import gguf_qwen3_moe
import ik_llama
import pytest
from gguf_demo import write_demo_moe


@pytest.fixture(scope="session")
def demo_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo mixture of experts in another file's Q4_1 blocks."""
    return write_demo_moe(tmp_path_factory.mktemp("gguf") / "demo.gguf")


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Name of a size in gguf_qwen3_moe.py -> the file in 16 bits."""
    root = tmp_path_factory.mktemp("gguf")
    return functools.cache(
        lambda size: gguf_qwen3_moe.write_qwen3_moe(root / f"{size}.gguf", getattr(gguf_qwen3_moe, size))
    )


@pytest.fixture(scope="session")
def quantised_gguf(
    tiny_gguf: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Path]:
    """Size and quantiser's word for a type -> the file as ik_llama.cpp's quantiser wrote it."""
    if ik_llama.find() is None:
        pytest.skip(ik_llama.ABSENT)
    root = tmp_path_factory.mktemp("quantised")

    @functools.cache
    def importance(size: str) -> Path:
        return gguf_qwen3_moe.write_importance_of(root / f"{size}.dat", getattr(gguf_qwen3_moe, size))

    @functools.cache
    def file(size: str, kind: str) -> Path:
        target = root / f"{size}-{kind}.gguf"
        return ik_llama.quantise(tiny_gguf(size), target, kind, importance=importance(size))

    return file
