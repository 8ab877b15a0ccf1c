"""`kt doctor --device` runs every path, fits a terminal and a report, and fails where a path is wrong."""

from __future__ import annotations

import torch
from typer.testing import CliRunner

from kt_kernel.cli import device_doctor
from kt_kernel.cli.checks.finding import Finding, Status
from kt_kernel.cli.main import app
from kt_kernel.hybrid.torch_experts import TorchDeviceExperts

CPU = torch.device("cpu")
PATHS = ("split", "prefill", "update", "misses")


def test_without_a_cuda_device_one_sentence_and_no_success():
    assert not torch.cuda.is_available()
    result = CliRunner().invoke(app, ["doctor", "--device"])
    assert result.exit_code == 2 and len(result.output.splitlines()) == 1
    assert "no CUDA device" in result.output


def test_all_paths_work_with_a_cpu_in_the_place_of_a_gpu(capsys):
    assert device_doctor.examine_device(CPU) == 0
    printed = capsys.readouterr().out
    assert "All paths of this device work." in printed
    assert all(len(line.rstrip()) <= 80 for line in printed.splitlines())
    states = {line.split()[0]: line.split()[1] for line in printed.splitlines() if len(line.split()) > 1}
    assert [states[name] for name in PATHS] == ["ok"] * len(PATHS)
    assert printed.count("needs a CUDA device") == 2 + 7


def test_a_device_that_drops_an_expert_fails_on_every_path(monkeypatch):
    sound = TorchDeviceExperts.compute

    def drops_slot_zero(self, hidden, slots, weights):
        return sound(self, hidden, torch.where(slots == 0, -1, slots), weights)

    monkeypatch.setattr(TorchDeviceExperts, "compute", drops_slot_zero)
    found = {
        name: check().status for name, check in device_doctor.checks(CPU) if name in ("prefill", "update")
    }
    assert set(found.values()) == {Status.FAIL}


def test_a_failed_path_is_the_exit_status_and_asks_for_a_report(monkeypatch, capsys):
    def one(device):
        yield "thing", lambda: Finding(Status.FAIL, "no [good] " * 20)

    monkeypatch.setattr(device_doctor, "checks", one)
    assert device_doctor.examine_device(CPU) == 1
    printed = capsys.readouterr().out
    assert "Please send this" in printed and "[good]" in printed
    assert all(len(line.rstrip()) <= 80 for line in printed.splitlines())
