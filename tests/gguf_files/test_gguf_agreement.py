"""A model whose experts come from a GGUF file says what transformers says of the decoded weights."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gguf_decoded import write_decoded
from transformers import AutoModelForCausalLM

TESTS = Path(__file__).resolve().parents[1]

from patched import PROMPT, agreement, load  # noqa: E402

KINDS = ("Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0", "IQ4_XS", "IQ3_XXS", "Q2_K")
MIXED = "Q4_K_M"  # down in two types


@pytest.fixture(scope="module")
def decoded(quantised_gguf, tmp_path_factory) -> Callable[[str], Path]:
    """Quantiser's word for a type -> the decoded checkpoint of the file."""
    root = tmp_path_factory.mktemp("decoded")
    return functools.cache(lambda kind: write_decoded(quantised_gguf("TINY", kind), root / kind))


@pytest.fixture(scope="module")
def reference(decoded) -> Callable[[str], torch.nn.Module]:
    """The decoded checkpoint in transformers, in float32."""
    return functools.cache(
        lambda kind: AutoModelForCausalLM.from_pretrained(decoded(kind), dtype=torch.float32).eval()
    )


@pytest.fixture(scope="module")
def patched(quantised_gguf, decoded) -> Callable[..., torch.nn.Module]:
    """Dense layers of the decoded checkpoint, experts of the file."""

    def build(kind: str, **options: object) -> torch.nn.Module:
        return load(decoded(kind), weight_path=quantised_gguf("TINY", kind), method="LLAMAFILE", **options)

    return build


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_and_logits_are_those_of_the_decoded_weights(kind, patched, reference):
    result = agreement(patched(kind, activations="bf16"), reference(kind))
    assert result.holds(), str(result)


@pytest.mark.parametrize("kind", KINDS)
def test_the_usual_activations_change_little(kind, patched, reference):
    result = agreement(patched(kind), reference(kind))
    assert result.holds_for_int8(), str(result)


@pytest.mark.parametrize(
    "options",
    [
        {"num_gpu_experts": 3},
        {"gpu_prefill_token_threshold": len(PROMPT)},
        {"num_gpu_experts": 4, "enable_dynamic_expert_update": True, "expert_update_interval": 3},
    ],
    ids=["resident", "layer by layer", "moving"],
)
def test_experts_written_to_a_device_are_the_files(options, patched, reference):
    """Decoded to bf16 on their way, whatever type each matrix has."""
    result = agreement(patched(MIXED, activations="bf16", **options), reference(MIXED))
    assert result.holds(), str(result)
