"""Tiny checkpoints of the families that are trained here, a few hundred KB each."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny_models
import torch
from training_families import SIZES


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """(family, changes of its configuration) -> the folder of its checkpoint, built on first use."""
    root = tmp_path_factory.mktemp("training")

    @functools.cache
    def build(family: str = "qwen3_moe", **changes: object) -> Path:
        folder = root / f"{family}-{len(list(root.iterdir()))}"
        return tiny_models.build(family, folder, **{**SIZES[family], **changes})

    return build


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Matrices are tiny here: torch's threads would wait for each other most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
