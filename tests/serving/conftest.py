"""Checkpoints and references that the tests of this folder share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models
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
    return functools.cache(
        lambda family: AutoModelForCausalLM.from_pretrained(
            tiny_checkpoint(family), dtype=torch.float32
        ).eval()
    )


@pytest.fixture(scope="session")
def own_cache(tmp_path_factory) -> dict[str, str]:
    """A server's environment: what it measures of the machine is kept apart from what the user's measured."""
    return {"XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache"))}
