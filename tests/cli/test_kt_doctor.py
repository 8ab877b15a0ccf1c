"""`kt doctor` must see what is broken, name the cause and what to do, and pass a sound installation."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from kt_kernel import KTMoEWrapper, kt_kernel_ext
from kt_kernel.cli import doctor, environment, forward_check, kernel_lines
from kt_kernel.cli.checks import Check, layers, machine, packages, server
from kt_kernel.cli.checks.finding import Finding, Status, run_check
from kt_kernel.cli.main import app

COLUMNS = kernel_lines.COLUMNS


def test_this_installation_is_sound_and_said_so_in_one_screen():
    result = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "400"})
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[-1].startswith(("All 15 checks passed.", "No check failed; worth a look: port."))
    assert [line for line in lines if len(line) > COLUMNS] == []
    assert len(lines) <= 24


def test_all_kernels_are_shown_with_details_and_the_verdict_comes_last(monkeypatch, capsys):
    doctor.examine(doctor.Detail.FULL, (Check("cpu", machine.cpu_features),))
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "All 1 checks passed."
    assert [line for line in lines if len(line) > COLUMNS] == []
    for method in kt_kernel_ext.METHODS:
        assert len([line for line in lines if line.startswith(f"{method} ")]) >= 1, method


def test_verbose_kernels_say_all_of_the_table_in_80_columns():
    rows = kt_kernel_ext.dispatch_table()
    lines = list(kernel_lines.detail_lines(rows))
    assert [line for line in lines if len(line) > COLUMNS] == []
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
    assert max(map(len, lines)) <= COLUMNS
    words = " ".join(lines).split()
    assert words == [*names, "bf16", "k", "-", "RARE", "bf16", "slow", "-"]


@pytest.mark.parametrize("detail", doctor.Detail)
def test_details_are_shown_when_asked_for(capsys, detail):
    finding = Finding(Status.OK, "word " * 40, detail="all of it")
    doctor.examine(detail, (Check("thing", lambda: finding),))
    lines = capsys.readouterr().out.splitlines()
    assert ("all of it" in "".join(lines)) == (detail is doctor.Detail.FULL)
    assert (len(lines) == 2) == (detail is doctor.Detail.BRIEF)
    assert max(map(len, lines)) <= COLUMNS


@pytest.mark.parametrize(("status", "expected"), [(Status.WARN, 0), (Status.FAIL, 1)])
def test_exit_status_tells_broken_from_unusual(capsys, status, expected):
    fine = Check("fine", lambda: Finding(Status.OK, "seen"))
    assert (
        doctor.examine(checks=(fine, Check("thing", lambda: Finding(status, "seen", "do this")))) == expected
    )
    *_, advice, verdict = capsys.readouterr().out.splitlines() if expected == 0 else ["", "", ""]
    assert expected or ("-> do this" in advice and verdict == "No check failed; worth a look: thing.")


def test_the_first_cause_is_named_and_what_needs_it_is_not_tried(capsys):
    tried = []
    later = Check("later", lambda: tried.append(1), ("cause",))
    last = Check("last", lambda: tried.append(1), ("later",))
    cause = Check("cause", lambda: Finding(Status.FAIL, "gone", "bring it back"))
    assert doctor.examine(checks=(cause, later, last)) == 1
    out = capsys.readouterr().out
    assert not tried and "skip later         not tried: needs cause" in out
    assert out.endswith("1 of 3 checks failed (2 not tried): cause.\nFirst bring it back.\n")


def test_check_that_crashes_is_a_failure():
    def crash() -> Finding:
        raise OSError("gone")

    finding = run_check(crash)
    assert (finding.status, finding.seen) == (Status.FAIL, "OSError: gone")


def test_layer_that_drops_an_expert_is_caught(monkeypatch):
    sound = KTMoEWrapper.forward

    def drops_expert_zero(self, hidden, ids, weights, cuda_stream=None):
        return sound(self, hidden, torch.where(ids == 0, -1, ids), weights, cuda_stream)

    monkeypatch.setattr(KTMoEWrapper, "forward", drops_expert_zero)
    one = forward_check.check_layer  # the other methods are seen in the test of this installation
    monkeypatch.setattr(forward_check, "check_layers", lambda threads: one("BF16", "bf16", threads))
    assert run_check(layers.expert_layer).status is Status.FAIL


def test_nan_is_not_accepted():
    assert not forward_check.ForwardResult("BF16", "bf16", 1, float("nan")).accepted


# ---- sabotaged environments: the cause, not its consequences ----


# Stands before all finders of modules.
FINDER = """
import sys
from importlib.util import spec_from_file_location
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "kt_kernel.kt_kernel_ext":
            {}
sys.meta_path.insert(0, Finder())
"""


def finding_of(check: str, folder: Path, prepare: str = "", **variables: str) -> list[str]:
    """Status, what was seen and the advice of one check in a process of its own, with `folder` before all
    packages, and `prepare` run first.
    """
    code = (
        f"{prepare}\nfrom kt_kernel.cli.checks import CHECKS, run_check\n"
        f"look = next(check.look for check in CHECKS if check.name == {check!r})\n"
        "found = run_check(look)\nprint(found.status.value, found.seen, found.advice, sep='\\n')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(folder), **variables},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def distribution(folder: Path, name: str, version: str) -> None:
    metadata = folder / f"{name.replace('-', '_')}-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_missing_hwloc_is_named_with_its_package(tmp_path):
    """The extension itself, asking for a library that is not there."""
    extension = tmp_path / Path(kt_kernel_ext.__file__).name
    extension.write_bytes(
        Path(kt_kernel_ext.__file__).read_bytes().replace(b"libhwloc.so.15\0", b"libhwloc.so.99\0")
    )
    prepare = FINDER.format(f"return spec_from_file_location(name, {str(extension)!r})")
    status, seen, advice = finding_of("extension", tmp_path, prepare)
    assert (status, seen) == ("fail", "the system's library libhwloc.so.99 is missing")
    assert "libhwloc15 (Debian" in advice


def test_extension_that_was_not_compiled_is_named(tmp_path):
    prepare = FINDER.format("raise ModuleNotFoundError(f'No module named {name!r}')")
    status, seen, advice = finding_of("extension", tmp_path, prepare)
    assert (status, seen) == ("fail", "it is not compiled for this Python") and "build" in advice


def test_other_sglang_version_is_named(tmp_path):
    distribution(tmp_path, "sglang", "0.5.22")
    status, seen, _ = finding_of("sglang", tmp_path)
    assert (status, seen) == ("fail", "SGLang is 0.5.22, but the plug-in is made for 0.5.23")


def test_package_of_the_same_name_is_recognised(tmp_path):
    distribution(tmp_path, "kt-kernel", "0.6.1")
    status, seen, advice = finding_of("package", tmp_path)
    assert status == "fail" and "another project's package" in seen and str(tmp_path) in seen
    assert "pip uninstall kt-kernel" in advice


def test_plug_in_that_is_switched_off_is_named(monkeypatch):
    monkeypatch.setenv("SGLANG_PLUGINS", "others")
    finding = run_check(server.hooks)
    assert finding.status is Status.FAIL and "SGLANG_PLUGINS=others" in finding.seen


@pytest.mark.parametrize(
    ("said", "seen"),
    [
        ("kt doctor: the plug-in could not hook", "the plug-in could not hook"),
        ("ImportError: broken", "SGLang cannot be imported (exit status 1): ImportError: broken"),
    ],
)
def test_hook_without_effect_is_named(monkeypatch, said, seen):
    done = subprocess.CompletedProcess([], 1, stdout="", stderr=f"noise\n{said}\n")
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: done)
    finding = run_check(server.hooks)
    assert (finding.status, finding.seen) == (Status.FAIL, seen)


def test_missing_plugin_is_a_failure(monkeypatch):
    monkeypatch.setattr(packages.importlib.metadata, "entry_points", lambda group: [])
    assert run_check(packages.plugin_registered).status is Status.FAIL


def test_one_core_is_a_warning(tmp_path):
    prepare = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})"
    status, seen, advice = finding_of("topology", tmp_path, prepare)
    assert status == "warn" and seen.startswith("this process may use one core"), seen
    assert "taskset" in advice


def test_control_group_of_one_core_is_a_warning(monkeypatch):
    class Native:
        @staticmethod
        def topology() -> dict:
            return {"physical_cores": 8, "cpu_quota": 1.0, "numa_nodes": []}

    monkeypatch.setattr(machine, "native_extension", Native)
    finding = run_check(machine.topology)
    assert finding.status is Status.WARN and "a control group grants 1 CPUs" in finding.seen
    assert "CPUQuota" in finding.advice


def test_port_that_is_taken_is_named_with_its_owner(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        number = taken.getsockname()[1]
        monkeypatch.setattr(machine, "configured", lambda key: number)
        finding = run_check(machine.port)
        assert finding.status is Status.WARN
        assert finding.seen.startswith(f"port {number} is taken by process {os.getpid()} (")
        assert f"--port {number + 1}" in finding.advice
    assert run_check(machine.port).status is Status.OK


@pytest.mark.parametrize(
    ("full", "fragment"), [("/dev/shm", "--shm-size"), ("/nowhere/cache", "XDG_CACHE_HOME")]
)
def test_no_space_is_a_failure(monkeypatch, full, fragment):
    def usage(path: Path) -> SimpleNamespace:
        return SimpleNamespace(free=1000 if full.startswith(str(path)) else 1 << 40)

    monkeypatch.setenv("XDG_CACHE_HOME", "/nowhere/cache")
    monkeypatch.setattr(shutil, "disk_usage", usage)
    finding = run_check(machine.disk)
    assert finding.status is Status.FAIL and "no space left" in finding.seen and fragment in finding.advice


@pytest.mark.parametrize(("made_by_script", "start"), [(True, "run ./install.sh build in "), (False, "run ")])
def test_advice_suits_the_environment(monkeypatch, tmp_path, made_by_script, start):
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "own"))
    if made_by_script:
        (tmp_path / "own/kt-install").mkdir(parents=True)
    advice = environment.advice_for_build()
    assert advice.startswith(start)
    assert made_by_script or advice.startswith(f"run {sys.executable} -m pip install")


def test_capped_cpu_is_a_warning(tmp_path):
    status, _, advice = finding_of("cpu", tmp_path, KT_KERNEL_CPU_VARIANT="avx2")
    assert status == "warn" and advice.startswith("KT_KERNEL_CPU_VARIANT=avx2")


def test_tiles_that_linux_refuses_are_a_warning(monkeypatch):
    class Native:
        @staticmethod
        def cpu_features() -> dict:
            why = "Linux refuses AMX tiles (arch_prctl: Operation not permitted)"
            return {"variant": "avx512_bf16", "active": [], "cap": None, "no_tiles": why}

    monkeypatch.setattr(machine, "native_extension", Native)
    finding = run_check(machine.cpu_features)
    assert finding.status is Status.WARN and "Linux refuses AMX tiles" in finding.seen
    assert "seccomp" in finding.advice


def test_unknown_variant_says_to_unset_it(tmp_path):
    status, seen, advice = finding_of("cpu", tmp_path, KT_KERNEL_CPU_VARIANT="avx9")
    assert status == "fail" and "avx9" in seen and "avx512_vnni" in seen
    assert advice == "unset KT_KERNEL_CPU_VARIANT"


def test_a_preference_is_not_called_missing():
    for row in kt_kernel_ext.dispatch_table():
        assert "lacks fma_beats_dot" not in row["reason"]


def test_version_names_every_component():
    output = CliRunner().invoke(app, ["version"]).stdout
    for component in ("kt-kernel 0", "cpu variant ", "torch ", "sglang 0.5.23", "transformers ", "python 3"):
        assert component in output
