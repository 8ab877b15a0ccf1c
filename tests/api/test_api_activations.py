"""Which activations a layer multiplies: the caller's choice, or what is faster; with the promised errors."""

import pytest
import torch
from api_support import nmse, random_call, random_experts, reference
from format_support import EXPERTS, HIDDEN, INTERMEDIATE, METHODS, decoded, make_layer, quantised

from kt_kernel import kt_kernel_ext
from kt_kernel.errors import ConfigurationError
from kt_kernel.formats import methods

ROWS = kt_kernel_ext.dispatch_table()
INT8 = [
    method for method in METHODS if any(r["method"] == method and r["activations"] == "int8" for r in ROWS)
]
BOUNDS = {"bf16": 1e-5, "int8": 2e-4}


def _loaded(method: str, activations: str, **changes):
    layer = make_layer(method, activations=activations, **changes)
    layer.load_weights_from_tensors(*random_experts(1, EXPERTS, HIDDEN, INTERMEDIATE))
    return layer


def _first(method: str, activations: str) -> str:
    """The kernel that a method takes for these activations on this CPU."""
    possible = [r for r in ROWS if r["method"] == method and r["state"] != "unavailable"]
    if activations == "auto":
        return next(r["kernel"] for r in possible if r["state"] == "chosen")
    return next(r["kernel"] for r in possible if r["activations"] == activations)


def test_every_integer_code_has_kernels_for_int8():
    assert set(INT8) == {"RAWINT4", "MXFP4", "NVFP4", "GPTQ_INT4", "AMXINT4", "AMXINT8"}


@pytest.mark.parametrize("method", INT8)
@pytest.mark.parametrize("tokens", [1, 40])
def test_int8_activations_cost_what_was_promised_and_bf16_are_not_rounded_so(method, tokens):
    weights = decoded(method, quantised(method))
    call = random_call(2, tokens, experts=EXPERTS, hidden_size=HIDDEN)
    expected = reference(weights, *call)
    errors = {}
    for kind, bound in BOUNDS.items():
        layer = _loaded(method, kind)
        # float32 in, so that the result is not rounded to bfloat16
        errors[kind] = nmse(layer.forward(call[0].float(), *call[1:]), expected)
        assert errors[kind] <= bound
        assert layer.moe.kernels == {"experts": _first(method, kind)}
    assert errors["int8"] > 2 * errors["bf16"]


@pytest.mark.parametrize("method", METHODS)
def test_auto_is_one_of_the_kinds_and_the_same_bits(method):
    auto = _loaded(method, "auto")
    kernel = auto.moe.kernels["experts"]
    assert kernel == _first(method, "auto")
    kind = next(row["activations"] for row in ROWS if row["method"] == method and row["kernel"] == kernel)
    call = random_call(3, 5, experts=EXPERTS, hidden_size=HIDDEN)
    assert torch.equal(auto.forward(*call), _loaded(method, kind).forward(*call))


@pytest.mark.parametrize("method", [method for method in METHODS if method not in INT8])
def test_int8_for_codes_that_are_no_integers_is_refused(method):
    with pytest.raises(
        ConfigurationError,
        match=rf"int8, but method {method} has no kernels for them, only RAWINT4, .*use auto",
    ):
        make_layer(method, activations="int8")


def test_the_layer_says_once_which_kernels_it_took(caplog, monkeypatch):
    monkeypatch.setattr(methods, "_announced", set())
    with caplog.at_level("INFO", logger="kt_kernel.formats.methods"):
        for _ in range(2):
            _loaded("AMXINT8", "bf16")
            _loaded("AMXINT8", "int8")
    said = [record.message for record in caplog.records]
    assert len(said) == 2
    for message, kind in zip(said, ("bf16", "int8"), strict=True):
        kernel = f"{_first('AMXINT8', kind)}, {kind} activations ("
        assert message.startswith(f"kernels for AMXINT8: experts: {kernel}")
