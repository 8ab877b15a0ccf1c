"""Risk: twin and native operator agree with each other and not with the code of SGLang that they replace."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


def test_operators_compute_what_sglangs_torch_code_does():
    environment = os.environ | {"KT_SGLANG_CPU_SHIMS": "1", "KT_CPU_OPERATORS": "off"}
    done = subprocess.run(
        [sys.executable, "sglangs_layers.py"],
        cwd=Path(__file__).parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    shares = json.loads(done.stdout.splitlines()[-1])
    assert len(shares) > 30
    assert {case: share for case, share in shares.items() if share > 0} == {}
