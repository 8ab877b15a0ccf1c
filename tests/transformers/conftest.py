"""The tiny checkpoints of tests/serving and their references, for models patched in this process."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models
import tiny_quantised
import torch
from transformers import AutoModelForCausalLM


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """family -> the folder of its tiny checkpoint, built on first use."""
    root = tmp_path_factory.mktemp("tiny-models")
    return functools.cache(lambda family: tiny_models.build(family, root / family))


@pytest.fixture(scope="session")
def tiny_reference(tiny_checkpoint: Callable[[str], Path]) -> Callable[[str], torch.nn.Module]:
    """family -> the same model in transformers, in float32."""
    return functools.cache(lambda family: _reference(tiny_checkpoint(family)))


@pytest.fixture(scope="session")
def quantised_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """layout -> the folder with `served` and `decoded` (tiny_quantised.py), built on first use."""
    root = tmp_path_factory.mktemp("tiny-quantised")
    return functools.cache(lambda layout: tiny_quantised.build(layout, root / layout))


@pytest.fixture(scope="session")
def quantised_reference(quantised_checkpoint: Callable[[str], Path]) -> Callable[[str], torch.nn.Module]:
    """layout -> the decoded weights in transformers, in float32."""
    return functools.cache(lambda layout: _reference(quantised_checkpoint(layout) / "decoded"))


def _reference(path: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
