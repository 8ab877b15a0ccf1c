"""What the plug-in does inside SGLang's own objects, without a server.

The checks need SGLang, so they run in an interpreter of their own: inside_sglang.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from server import clean_environment, free_port


def test_the_checks_inside_sglang_find_nothing_wrong(tiny_checkpoint):
    program = Path(__file__).with_name("inside_sglang.py")
    done = subprocess.run(
        [sys.executable, str(program), str(tiny_checkpoint("qwen3_moe")), str(free_port())],
        env={**clean_environment(), "KT_SGLANG_CPU_SHIMS": "1"},
        capture_output=True,
        text=True,
        timeout=480,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    outcomes = dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))
    wrong = [f"{name}:\n{what}" for name, what in outcomes.items() if what is not None]
    assert not wrong, "\n".join(wrong)
    assert len(outcomes) == 13
