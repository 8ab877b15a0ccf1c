"""The other commands of `kt` against the served demo; test_serve_demo.py imports these tests."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

KT = Path(sys.executable).with_name("kt")


def test_kt_chat_asks_it(demo):
    command = [KT, "chat", "--port", str(demo.port), "-t", "0"]
    question = "What is the capital of France?\n/retry\n"
    done = subprocess.run(command, input=question, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == 2 * "The capital of France is Paris.\n"
    # As the server counts: 7 and the end.
    assert done.stderr.count("[8 tokens, first after ") == 2, done.stderr


def test_kt_bench_serve_measures_it(demo):
    options = ["--users", "1,2", "-n", "2", "--prompt-tokens", "40", "--output-tokens", "6", "--json"]
    command = [KT, "bench", "serve", "--port", str(demo.port), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    levels = [json.loads(line) for line in done.stdout.splitlines()]
    assert [level["level"]["users"] for level in levels] == [1, 2]
    for level in levels:
        assert level["finished"] == 2 and level["output_tokens"] == 6
        assert abs(level["prompt_tokens"] - 40) <= 4  # this tokenizer cuts few of the words
        assert level["ttft_ms"]["median"] > 0 < level["tpot_ms"]["median"]


def test_kt_top_shows_it(demo):
    command = [KT, "top", "--port", str(demo.port), "-n", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.startswith("demo") and "0 of 240 on the device" in done.stdout
