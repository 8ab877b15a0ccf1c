"""Families without rows of their own in regimes.py: their experts are those of others, the rest is theirs.

Ernie-4.5 counts MoE layers from a start and selects with a bias; Hunyuan gives every layer its sizes.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from agreement import compare, served_continuation, served_prompt
from server import kt_options, serving
from texts import ENGLISH
from transformers import AutoTokenizer

from kt_kernel.errors import ConfigurationError
from kt_kernel.integrations.sglang import cpu_fixes

FAMILIES = ("ernie4_5_moe", "hunyuan_v1_moe")
OPTIONS = ("--dtype", "float32", "--chunked-prefill-size", "256", "--max-total-tokens", "4096")
PROMPT_TOKENS = 600


@pytest.mark.parametrize("family", FAMILIES)
def test_served_tokens_are_the_models_tokens(family, tiny_checkpoint, tiny_reference, own_cache, tmp_path):
    model = tiny_checkpoint(family)
    tokens = AutoTokenizer.from_pretrained(model)
    options = (*kt_options(model), *OPTIONS)
    with serving(model, tmp_path / "log", *options, environment=own_cache) as server:
        answers = [
            served_prompt(server, tokens(ENGLISH).input_ids[:PROMPT_TOKENS]),
            served_continuation(server, tokens("The keeper").input_ids, 32),
        ]
    agreement = compare(tiny_reference(family), *answers)
    assert agreement.decided > 300
    assert agreement.holds(), str(agreement)


@pytest.mark.parametrize("wrapped", ["whole", "text", "part"])
def test_only_lists_of_sizes_are_kept_from_stock_code(wrapped):
    """Stock code looks into the model's configuration, its text model's, or a part of it, as for images."""

    def config(sizes: object) -> SimpleNamespace:
        held = SimpleNamespace(moe_intermediate_size=sizes)
        if wrapped == "text":
            held = SimpleNamespace(text_config=held)
        return held if wrapped == "part" else SimpleNamespace(hf_config=held)

    def pad(sizes: object) -> object:
        stock = lambda *arguments: "stock"  # noqa: E731
        return cpu_fixes.pad_intermediate_size(stock, config(sizes), "moe_intermediate_size", 64)

    assert pad(3072) == pad(None) == "stock"
    assert pad([128, 192]) == config([128, 192])
    with pytest.raises(ConfigurationError, match=r"is \[96, 128\], expected multiples of 64 on a CPU"):
        pad([128, 96, 128])
