"""`kt doctor` must pass on a sound installation and fail, by its exit status, on a broken one."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from kt_kernel import KTMoEWrapper
from kt_kernel.cli import checks, doctor, forward_check, kernel_lines
from kt_kernel.cli.checks import Finding, Status, run_check
from kt_kernel.cli.main import app


def test_this_installation_is_sound_and_said_so_in_80_columns():
    result = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "400"})
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[-1] == "All checks passed."
    assert [line for line in lines if len(line) > kernel_lines.COLUMNS] == []
    for method in checks.native_extension().METHODS:
        assert len([line for line in lines if line.startswith(f"{method} ")]) == 1, method


def test_verbose_kernels_say_all_of_the_table_in_80_columns():
    rows = checks.native_extension().dispatch_table()
    lines = list(kernel_lines.detail_lines(rows))
    assert [line for line in lines if len(line) > kernel_lines.COLUMNS] == []
    words = " ".join(" ".join(lines).split())
    for row in rows:
        for fact in (row["method"], row["kernel"], row["reason"], " ".join(row["needs"]), row["machines"]):
            assert fact in words


def _row(**changes) -> dict:
    row = {
        "method": "M",
        "format": "M",
        "operation": "experts",
        "kernel": "k",
        "activations": "bf16",
        "machines": "any",
    }
    return {**row, "needs": ["avx2"], "state": "available", "reason": "because", **changes}


def test_the_chosen_kernel_stands_beside_the_best_of_the_other_activations():
    rows = [
        _row(kernel="new", activations="int8", state="unavailable"),
        _row(kernel="best", activations="int8", state="chosen"),
        _row(kernel="other"),
        _row(kernel="last"),
        _row(method="N", format="N", kernel="none", state="unavailable"),
    ]
    _, line, without = kernel_lines.summary_lines(rows)
    assert line.split() == ["M", "int8", "best", "bf16:", "other"]
    assert without.split()[:3] == ["N", "-", "no"]


def test_formats_of_a_method_that_run_alike_share_a_line():
    names = [f"TYPE{number}" for number in range(20)]
    rows = [_row(format=name, kernel="k", state="chosen") for name in names]
    rows.append(_row(format="RARE", kernel="slow", state="chosen"))
    _, head, *lines = kernel_lines.summary_lines(rows)
    assert head == "M               by the type of each matrix:"
    assert max(map(len, lines)) <= kernel_lines.COLUMNS
    words = " ".join(lines).split()
    assert words == [*names, "bf16", "k", "-", "RARE", "bf16", "slow", "-"]


@pytest.mark.parametrize("detail", doctor.Detail)
def test_details_are_shown_when_asked_for(monkeypatch, capsys, detail):
    finding = Finding(Status.OK, "word " * 40, detail="all of it")
    monkeypatch.setattr(doctor, "CHECKS", {"thing": lambda: finding})
    doctor.examine(detail)
    out = capsys.readouterr().out
    assert ("all of it" in out) == (detail is doctor.Detail.FULL)
    assert out.count("word") == 40 and max(map(len, out.splitlines())) <= kernel_lines.COLUMNS


@pytest.mark.parametrize(("status", "expected"), [(Status.WARN, 0), (Status.FAIL, 1)])
def test_exit_status_tells_broken_from_unusual(monkeypatch, capsys, status, expected):
    monkeypatch.setattr(doctor, "CHECKS", {"thing": lambda: Finding(status, "seen", "do this")})
    assert doctor.examine() == expected
    assert "-> do this" in capsys.readouterr().out


def test_check_that_crashes_is_a_failure():
    def crash() -> Finding:
        raise OSError("gone")

    assert run_check(crash) == Finding(Status.FAIL, "OSError: gone", "run ./install.sh")


def test_layer_that_drops_an_expert_is_caught(monkeypatch):
    sound = KTMoEWrapper.forward

    def drops_expert_zero(self, hidden, ids, weights, cuda_stream=None):
        return sound(self, hidden, torch.where(ids == 0, -1, ids), weights, cuda_stream)

    monkeypatch.setattr(KTMoEWrapper, "forward", drops_expert_zero)
    assert run_check(checks.expert_layer).status is Status.FAIL


def test_nan_is_not_accepted():
    assert not forward_check.ForwardResult("BF16", "bf16", 1, float("nan")).accepted


def test_missing_plugin_is_a_failure(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [])
    assert run_check(checks.plugin_registered).status is Status.FAIL


def test_server_without_our_flags_is_a_failure(monkeypatch):
    done = subprocess.CompletedProcess([], 0, stdout="--kt-method", stderr="")
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: done)
    assert run_check(checks.server_flags).status is Status.FAIL


def test_capped_cpu_is_a_warning():
    environment = os.environ | {"KT_KERNEL_CPU_VARIANT": "avx2"}
    code = (
        "from kt_kernel.cli.checks import cpu_features; f = cpu_features(); print(f.status.value, f.advice)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.startswith("warn KT_KERNEL_CPU_VARIANT=avx2"), done.stderr


def test_unknown_variant_is_a_failure_not_a_crash():
    environment = os.environ | {"KT_KERNEL_CPU_VARIANT": "avx9"}
    code = "from kt_kernel.cli.checks import *; f = run_check(cpu_features); print(f.status.value, f.seen)"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.startswith("fail ") and "avx9" in done.stdout, done.stderr


def test_version_names_every_component():
    output = CliRunner().invoke(app, ["version"]).stdout
    for component in ("kt-kernel 0", "cpu variant ", "torch ", "sglang 0.5.23", "transformers ", "python 3"):
        assert component in output
