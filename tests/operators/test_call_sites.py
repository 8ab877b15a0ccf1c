"""Risk: SGLang calls an operator with arguments that ours does not take.

Every call site in the installed wheel is compared with the schema that is registered, native or in Python.
"""

from __future__ import annotations

import pytest
import torch
from call_sites import CallSite, call_sites, mentioned

from kt_kernel import kt_kernel_ext
from kt_kernel.operators import registration

SITES = call_sites()
MENTIONED = mentioned()


def schemas() -> dict[str, torch._C.FunctionSchema]:
    texts = list(kt_kernel_ext.operator_schemas())
    texts += [one.name + one.schema for one in registration.python_operators().values()]
    parsed = [torch._C.parse_schema(text) for text in texts]
    return {
        schema.name.partition("::")[2]: schema for schema in parsed if schema.name.startswith("sgl_kernel")
    }


SCHEMAS = schemas()


def what_does_not_fit(site: CallSite, schema: torch._C.FunctionSchema) -> str | None:
    names = [argument.name for argument in schema.arguments]
    given = names[: site.positional] + list(site.keywords)
    missing = [a.name for a in schema.arguments if a.name not in given and not a.has_default_value()]
    if site.positional > len(names):
        return f"{site.positional} arguments, {len(names)} are taken"
    if set(site.keywords) - set(names):
        return f"unknown keywords {sorted(set(site.keywords) - set(names))}"
    if len(given) != len(set(given)):
        return "an argument twice"
    if missing:
        return f"nothing for {missing}"
    if site.results is not None and site.results != len(schema.returns):
        return f"{site.results} results are expected, {len(schema.returns)} returned"
    return None


def test_the_reader_finds_what_is_known_to_be_there():
    called = {site.operator for site in SITES}
    assert {"rmsnorm_cpu", "decode_attention_cpu", "fused_experts_cpu", "apply_rotary_pos_emb_cpu"} <= called
    decode = next(site for site in SITES if site.operator == "decode_attention_cpu")
    assert decode.positional == 19 and decode.place.startswith("layers/attention/intel_amx_backend.py:")
    assert len(SITES) > 50 and len(MENTIONED) > 55


def test_every_operator_that_sglang_looks_up_exists():
    lacking = {name: place for name, place in MENTIONED.items() if name not in SCHEMAS}
    assert not lacking


@pytest.mark.parametrize("operator", sorted({site.operator for site in SITES}))
def test_call_sites_fit_the_schema(operator):
    for site in SITES:
        if site.operator == operator:
            problem = what_does_not_fit(site, SCHEMAS[operator])
            assert problem is None, f"{site.place} calls {operator}: {problem}; we have {SCHEMAS[operator]}"


def test_a_call_that_does_not_fit_is_seen():
    schema = torch._C.parse_schema("f(Tensor a, int b, bool c=False) -> (Tensor, Tensor)")
    fits = CallSite("f", "", 2, (), 2)
    assert what_does_not_fit(fits, schema) is None
    assert what_does_not_fit(CallSite("f", "", 4, (), 2), schema) == "4 arguments, 3 are taken"
    assert what_does_not_fit(CallSite("f", "", 1, (), 2), schema) == "nothing for ['b']"
    assert what_does_not_fit(CallSite("f", "", 2, ("d",), 2), schema) == "unknown keywords ['d']"
    assert what_does_not_fit(CallSite("f", "", 2, ("b",), 2), schema) == "an argument twice"
    assert what_does_not_fit(CallSite("f", "", 2, (), 3), schema) == "3 results are expected, 2 returned"
