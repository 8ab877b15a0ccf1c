"""Risk: after a kill at a bad moment the conversion cannot go on, starts over, or gives other files."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from pathlib import Path

import checkpoints
import pytest
from checkpoints import write_checkpoint
from test_converted_numbers import converted

from kt_kernel import detect_method
from kt_kernel.convert.job import Conversion, convert
from kt_kernel.convert.targets import target
from kt_kernel.errors import CheckpointError, ConversionError

SCRIPT = Path(__file__).with_name("killed_conversion.py")
LAYERS = (0, 1, 2)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def killed(source: Path, output: Path, method: str, calls: list[int]) -> list[dict]:
    done = subprocess.run(
        [sys.executable, SCRIPT, source, output, method, *map(str, calls)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(("method", "seed"), [("int8", 1), ("int4", 2)])
def test_killed_conversions_continue_to_the_same_files(tmp_path, method, seed):
    """A layer is 20 calls: the kills hit writes, renames, flushes, and the small files at the end."""
    source = tmp_path / "in"
    write_checkpoint(source, checkpoints.stored_bf16, layers=LAYERS)
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in source.iterdir()}
    converted(source, tmp_path / "whole", method, 32)
    moments = random.Random(seed)
    calls = [1, 2, 3, *(moments.randint(1, 30) for _ in range(10)), *range(6, 16, 2)]
    reports = killed(source, tmp_path / "killed", method, calls)
    statuses = [report["status"] for report in reports]
    assert set(statuses) == {-signal.SIGKILL, 0} and statuses.count(-signal.SIGKILL) >= 6, statuses
    assert any(name.endswith(".partial") for report in reports for name in report["left"]), (
        "no kill hit a write"
    )
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in source.iterdir()} == before


def test_a_reader_of_an_unfinished_folder_is_told(tmp_path):
    source, output = tmp_path / "in", tmp_path / "out"
    write_checkpoint(source, checkpoints.stored_bf16, layers=LAYERS)
    (report, finished) = killed(source, output, "int8", [60])
    assert "model-layer-00000.safetensors" in report["left"] and finished["status"] == 0
    assert detect_method(output) == "AMXINT8"
    manifest = json.loads((output / "kt_manifest.json").read_text())
    (output / "kt_manifest.json").write_text(json.dumps({**manifest, "complete": False}))
    with pytest.raises(CheckpointError, match="was not finished"):
        detect_method(output)


def test_finished_layers_are_not_computed_again(tmp_path):
    source, output = tmp_path / "in", tmp_path / "out"
    write_checkpoint(source, checkpoints.stored_bf16, layers=LAYERS)
    converted(source, output, "int8", 0)
    whole = files(output)
    (output / "model-layer-00001.safetensors").unlink()
    kept = {path: path.stat().st_mtime_ns for path in output.glob("model-layer-*")}
    outcome = convert(Conversion(source, output, target("int8", 0), 1))
    assert (outcome.converted, outcome.found) == (1, 2)
    assert files(output) == whole
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_the_number_of_threads_does_not_show(tmp_path):
    source = tmp_path / "in"
    write_checkpoint(source, checkpoints.stored_fp8_blocks)
    for threads in (1, 5):
        convert(Conversion(source, tmp_path / str(threads), target("int4", 64), threads))
    assert files(tmp_path / "1") == files(tmp_path / "5")


def test_other_weights_under_the_same_names_are_seen(tmp_path):
    """The same shapes, one layer finished: a fine-tuned model must not be mixed with its original."""
    source, output = tmp_path / "in", tmp_path / "out"
    write_checkpoint(source, checkpoints.stored_bf16)
    converted(source, output, "int8", 0)
    other = tmp_path / "other"
    write_checkpoint(other, checkpoints.stored_bf16, seed=12)
    with pytest.raises(ConversionError, match="was made from other weights"):
        convert(Conversion(other, output, target("int8", 0), 1))
