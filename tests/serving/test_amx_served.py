"""Risk: the AMX kernels are right alone and wrong in a server, with its threads and processes.

On a CPU without AMX, its instructions are trapped (tests/kernels/trapped_amx.py): the server runs the machine
code that ships.
"""

from __future__ import annotations

import pytest
import trapped_amx
from agreement import compare, served_continuation, served_prompt
from server import kt_options, serving
from texts import ENGLISH
from transformers import AutoTokenizer

FAMILY = "qwen3_moe"


@pytest.fixture(scope="module")
def with_amx(tmp_path_factory) -> dict[str, str]:
    if trapped_amx.detected() >= trapped_amx.FEATURES:
        return {}
    if reason := trapped_amx.not_here():
        pytest.skip(reason)
    return trapped_amx.package_environment(tmp_path_factory.mktemp("trapped_amx"))


def test_served_tokens_are_the_models_tokens_on_amx(
    with_amx, tiny_checkpoint, tiny_reference, own_cache, tmp_path
):
    model = tiny_checkpoint(FAMILY)
    tokenizer = AutoTokenizer.from_pretrained(model)
    environment = own_cache | with_amx
    with serving(
        model, tmp_path / "log", *kt_options(model), "--dtype", "float32", environment=environment
    ) as server:
        assert "bf16.amx" in server.log_text()
        prompt = tokenizer(ENGLISH).input_ids
        answers = [
            served_prompt(server, prompt),
            served_continuation(server, tokenizer("Water boils at").input_ids, 24),
        ]
    agreement = compare(tiny_reference(FAMILY), *answers)
    assert agreement.decided > 200
    assert agreement.holds(), str(agreement)
