"""The machine of cuda_code.py is believed by SGLang, and what reaches its GPU is seen."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize("capability", ["9.0", "12.0"])
def test_kernels_of_both_layers_are_seen(on_cuda, capability: str):
    on_cuda("inside_cuda_code", "check_triton_launches", capability)
