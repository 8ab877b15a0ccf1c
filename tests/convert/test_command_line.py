"""Risk: a command that worked with older converters fails, or an option is taken for something else."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import checkpoints
import pytest
from checkpoints import write_checkpoint
from test_interrupted import files
from typer.testing import CliRunner

from kt_kernel.cli.main import app
from kt_kernel.convert.compare import compare
from kt_kernel.convert.job import Conversion, convert
from kt_kernel.convert.progress import Progress, describe
from kt_kernel.convert.settings import main
from kt_kernel.convert.targets import target

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "in", checkpoints.stored_bf16)
    return tmp_path / "in"


def test_an_old_command_line_gives_the_same_files_and_says_what_it_ignores(source, tmp_path, capsys):
    old = "--input-type bf16 --quant-method moe_int8 --cpuinfer-threads 3 --threadpool-count 2 --gpu"
    old += " --no-merge-safetensor --resume-layer 2 --save-backward-weights --profile"
    assert main(["--input-path", str(source), "--output", str(tmp_path / "old"), *old.split()]) == 0
    said = capsys.readouterr().err
    for option in old.split():
        ignored = option.startswith("--") and option not in (
            "--input-type",
            "--quant-method",
            "--cpuinfer-threads",
        )
        assert (f"note: {option}:" in said) == ignored, option
    assert main(["-i", str(source), "-o", str(tmp_path / "new"), "--quant-method", "int8"]) == 0
    assert "note:" not in capsys.readouterr().err
    assert files(tmp_path / "old") == files(tmp_path / "new")


def test_the_script_fails_with_one_sentence(tmp_path):
    command = [sys.executable, ROOT / "scripts/convert_cpu_weights.py", "-i", tmp_path / "no", "-o", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1


def test_kt_quant_writes_beside_the_model(source):
    result = CliRunner().invoke(app, ["quant", str(source), "-m", "int8", "--numa-nodes", "2", "-y"])
    assert result.exit_code == 0, result.output
    manifest = json.loads((source.parent / "in-AMXINT8" / "kt_manifest.json").read_text())
    assert manifest["method"] == "AMXINT8" and manifest["complete"] is True


def test_kt_quant_fails_with_one_sentence(source):
    result = CliRunner().invoke(app, ["quant", str(source), "-m", "int3"])
    assert result.exit_code == 1
    assert "expected int4 or int8" in result.output


def test_configuration_and_tokenizer_are_copied(source, tmp_path):
    convert(Conversion(source, tmp_path / "out", target("int4"), 1))
    for name in ("config.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()


def test_comparing_sees_how_far_weights_and_outputs_are(source, tmp_path):
    """The square of the largest of 32 normal numbers is 5.6 on average, and an error a twelfth of a step
    squared: NMSE 5.6 / 127**2 / 12 = 2.9e-5 for 8 bits, 9.5e-3 for 4.
    """
    for method, expected in (("int8", 2.9e-5), ("int4", 9.5e-3)):
        convert(Conversion(source, tmp_path / method, target(method, 32), 2))
        results = list(compare(source, tmp_path / method))
        assert [result.layer for result in results] == [1, 2]
        for result in results:
            for error in result.weights.values():
                assert 0.8 * expected < error < 1.25 * expected
            assert 2 * expected < result.output < 4 * expected


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere():
    for stream, redraws in ((Terminal(), True), (io.StringIO(), False)):
        progress = Progress(200, stream)
        progress.layer("layer 3 (1 of 2)")
        progress.add(100)
        progress.layer("layer 4 (2 of 2)")
        progress.end()
        shown = stream.getvalue()
        assert ("\r" in shown) == redraws and shown.endswith("layer 4 (2 of 2)\n")
        assert " 50 %" in shown


def test_progress_says_how_much_time_is_left():
    assert describe(0, 100, 5.0) == "  0 %"
    assert describe(10**9, 4 * 10**9, 10.0) == " 25 %, 0.10 GB/s, 0:30 left"
    assert describe(1, 10**4, 1.0).endswith("2:46:39 left")
