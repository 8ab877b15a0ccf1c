"""A converted model through the whole server: the original's dense layers, experts of integers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from server import kt_options, serving

from kt_kernel import demo

CONVERTER = Path(__file__).resolve().parents[2] / "scripts" / "convert_cpu_weights.py"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.mark.parametrize(("method", "name"), [("int8", "AMXINT8")])
def test_the_converted_demo_says_paris(tmp_path, method, name):
    original, converted = demo.ensure_demo_checkpoint(), tmp_path / "converted"
    command = [sys.executable, CONVERTER, "-i", original, "-o", converted, "--quant-method", method]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    index = json.loads((converted / "model.safetensors.index.json").read_text())
    assert all(".mlp.experts." in tensor for tensor in index["weight_map"]), "no more than the experts"
    options = (*kt_options(converted), "--dtype", "float32")
    with serving(original, tmp_path / "log", *options) as server:
        assert f"kt-kernel: method {name} from {converted}" in server.log_text()
        answer = server.post(
            "/v1/chat/completions", model="demo", messages=QUESTION, temperature=0, max_tokens=40
        )
        assert "Paris" in answer["choices"][0]["message"]["content"]
