"""SGLang's Triton kernels compute what torch does when a layer has slots for some experts, and -1 for others.

They run in triton's interpreter, as SGLang launches them for a layer of our method.
"""

from __future__ import annotations

import json

import pytest
from cuda_code import environment
from isolation import isolated

# The interpreter cuts bf16 off where a GPU rounds, three times between input and output, and the codes of
# activations then differ. An expert that is left out moves its token by a fifth or more.
TOLERANCE = 0.06


@pytest.fixture(scope="module")
def errors() -> dict[str, dict[str, dict[str, float]]]:
    """By format, "some" or "all" experts having slots, and routing: how far the result is from torch's."""
    # What SGLang gives to torch.compile runs as it is written.
    variables = environment() | {"TRITON_INTERPRET": "1", "TORCHDYNAMO_DISABLE": "1"}
    printed = isolated("inside_interpreter", "measure_errors", "9.0", timeout=1800, **variables)
    return json.loads(printed.splitlines()[-1])


@pytest.mark.parametrize("experts", ["some", "all"])
@pytest.mark.parametrize("format_name", ["bf16", "fp8 blocks", "fp8 rows", "int8 rows"])
def test_result_is_torchs_with_experts_missing(errors, format_name: str, experts: str):
    found = errors[format_name][experts]
    assert found and max(found.values()) < TOLERANCE, found


def test_token_without_an_expert_on_the_device_gets_zero(errors):
    assert errors["bf16"]["some"]["no token with any"] == 0
