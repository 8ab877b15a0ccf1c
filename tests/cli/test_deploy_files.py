"""Risk: the Dockerfile or the systemd unit no longer fits the repository, and no test builds or starts them.

Neither is run: there may be no container engine and no systemd. What can be compared without them is.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kt_kernel.cli.supervise import GRACE_SECONDS

ROOT = Path(__file__).resolve().parents[2]
UNIT = ROOT / "scripts/kt-kernel.service"


def unit_value(key: str) -> str:
    (value,) = re.findall(rf"^{key}=(.*)$", UNIT.read_text(), re.M)
    return value


def let_into_the_image() -> list[str]:
    """The paths of .dockerignore's exceptions; its first pattern keeps out everything else."""
    patterns = [
        line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] not in "#"
    ]
    assert patterns[0] == "*"
    return [pattern[1:] for pattern in patterns if pattern[0] == "!"]


def test_all_that_is_compiled_is_let_into_the_image():
    listed = subprocess.run(
        ["bash", "-c", "source ./install.sh && source_files"], cwd=ROOT, capture_output=True, check=True
    )
    files = [name for name in listed.stdout.decode().split("\0") if name and not name.endswith(".so")]
    allowed = let_into_the_image()
    kept_out = [
        name for name in files if not any(name == path or name.startswith(path + "/") for path in allowed)
    ]
    assert len(files) > 300
    assert kept_out == []
    assert all((ROOT / path).exists() for path in allowed)


def test_the_image_is_made_from_what_exists():
    text = (ROOT / "Dockerfile").read_text()
    for sources in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.M):
        assert all((ROOT / source).exists() for source in sources.split()), sources
    usage = (ROOT / "install.sh").read_text().split("TEXT")[1]
    commands = re.findall(r"\./install\.sh --\$\{KIND\} (\w+)", text)
    assert commands == ["deps", "build"]
    assert all(re.search(rf"^  {command} ", usage, re.M) for command in commands)
    stages = set(re.findall(r" AS runtime-(\w+)", text))
    assert stages == {"cpu", "cuda"}  # FROM runtime-${KIND}


def test_the_unit_lets_the_server_finish():
    assert int(unit_value("TimeoutStopSec")) > GRACE_SECONDS
    assert unit_value("KillMode") == "mixed"  # the server is told to end by `kt run`, not beside it


def test_a_model_whose_path_has_spaces_stays_one_argument():
    """systemd splits the value of $NAME at spaces, that of ${NAME} not."""
    assert unit_value("ExecStart").endswith("/kt run ${KT_MODEL} $KT_OPTIONS")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_understands_the_unit(tmp_path):
    kt = str(Path(sys.executable).with_name("kt"))
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace("/opt/kt-kernel/.venv/bin/kt ", f"{kt} "))
    assert kt in unit.read_text()

    def complaints() -> str:
        done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True)
        return done.stdout + done.stderr

    assert unit.name not in complaints()
    unit.write_text(unit.read_text().replace("ProtectHome=yes", "ProtectHous=yes"))
    assert "ProtectHous" in complaints()  # negative control
