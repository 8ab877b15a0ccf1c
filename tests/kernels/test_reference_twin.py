"""Risk: the slow twin in the extension drifts from the formulas or decodes the packed panels wrongly, and
misleads whoever checks a server against it.
"""

from __future__ import annotations

import numpy as np
import pytest
from formats import F32, FORMATS, ONE_PER_METHOD
from harness import arguments, build_layer, ext, nmse, poisoned, random_call, random_experts, reference


@pytest.mark.parametrize(("threads", "subpools"), [(1, 1), (2, 2), (3, 3)])
@pytest.mark.parametrize(("hidden", "intermediate"), [(64, 96), (33, 70), (100, 31)])
@pytest.mark.parametrize(("limit", "alpha"), [(0.0, 0.0), (0.5, 0.0), (1.0, 1.702)])
@pytest.mark.parametrize("format", ONE_PER_METHOD, ids=str)
def test_twin_agrees_with_float64_numpy(format, threads, subpools, hidden, intermediate, limit, alpha):
    experts = random_experts(5, 4, hidden, intermediate, format)
    call = random_call(5, experts, 7, top_k=2)
    call.ids[2, 0] = -1
    layer = build_layer(ext.Engine(threads, subpools), experts, swiglu_limit=limit, swiglu_alpha=alpha)
    output = poisoned(call.hidden.shape, F32)
    layer.forward_reference(*arguments(call, output, F32))
    # Both sum in double; what is left is the rounding of the output to fp32.
    assert nmse(output, reference(experts, call, limit, alpha)) < 1e-14
    assert np.isfinite(output).all()


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_twin_decodes_every_kind_of_scale(format):
    experts = random_experts(6, 3, 300, 140, format)
    call = random_call(6, experts, 4, top_k=2)
    output = poisoned(call.hidden.shape, F32)
    build_layer(ext.Engine(2, 2), experts).forward_reference(*arguments(call, output, F32))
    assert nmse(output, reference(experts, call)) < 1e-14
