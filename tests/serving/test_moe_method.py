"""Risk: a layer that the CPU experts do not compute is served all the same, or its sums by another factor."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from server import clean_environment

REFUSED = (
    "expert parallelism over 2 ranks",
    "shared experts fused into the routed ones",
    "the activation 'gelu'",
    "experts without a gate projection",
    "the activation offset 0.5",
    "router weights applied to the input",
)


def test_layers_are_refused_by_what_they_are_and_the_factor_is_the_devices():
    program = Path(__file__).with_name("inside_moe_method.py")
    done = subprocess.run(
        [sys.executable, str(program)],
        env={**clean_environment(), "KT_SGLANG_CPU_SHIMS": "1"},
        capture_output=True,
        text=True,
        timeout=480,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    *sentences, factors = (
        json.loads(line) for line in done.stdout.splitlines() if line.startswith(("[", '"'))
    )
    assert len(sentences) == len(REFUSED)
    for sentence, what in zip(sentences, REFUSED, strict=True):
        assert sentence.startswith(f"not available yet: layer 3 has {what};")
    assert factors == [2.5, 1.0, 1.0, 1.0, 1.0]
