"""gpt-oss with some of its experts beside the CPU's, in SGLang's own torch code: they keep their biases, and
their rows of gate and up come in turn.
"""

from __future__ import annotations

import pytest
import tiny_models
import tiny_quantised
import torch
from agreement import Agreement, compare, served_continuation, served_prompt
from server import kt_options, serving
from texts import ENGLISH
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPT_TOKENS = 600
PLACEMENT = ("--kt-num-gpu-experts", "5", "--kt-expert-placement-strategy", "random")
OPTIONS = ("--chunked-prefill-size", "128", "--max-total-tokens", "4096", "--kt-activations", "bf16")
# name -> the checkpoint that is served, that of the decoded weights, options, what must hold.
# SGLang computes an MXFP4 model in bfloat16, whatever --dtype says.
CASES = {
    "gpt_oss": ("", "", ("--dtype", "float32"), Agreement.holds),
    "gpt-oss": ("served", "decoded", (), Agreement.holds_in_16_bits),
}


@pytest.mark.parametrize("name", CASES)
def test_experts_on_the_device_have_their_biases(name, own_cache, tmp_path):
    served, decoded, options, holds = CASES[name]
    root = (tiny_models if served == "" else tiny_quantised).build(name, tmp_path / "model")
    model = root / served
    tokens = AutoTokenizer.from_pretrained(model)
    words = (*kt_options(model), *PLACEMENT, *OPTIONS, *options)
    with serving(model, tmp_path / "log", *words, environment=own_cache) as server:
        answers = [
            served_prompt(server, tokens(ENGLISH).input_ids[:PROMPT_TOKENS]),
            served_continuation(server, tokens("The keeper").input_ids, 48),
        ]
        assert 0.2 < server.report()["hit_rate"] < 0.6  # 5 of 16 experts
    reference = AutoModelForCausalLM.from_pretrained(root / decoded, dtype=torch.float32).eval()
    agreement = compare(reference, *answers)
    assert agreement.decided > 300
    assert holds(agreement), str(agreement)
    placed = range(16)[::3]  # about as many as the device has: their biases alone are noticed
    with torch.no_grad():
        for parameter in (p for n, p in reference.named_parameters() if n.endswith("_proj_bias")):
            parameter[list(placed)] = 0
    assert not holds(compare(reference, *answers))
