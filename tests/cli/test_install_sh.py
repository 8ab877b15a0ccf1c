"""install.sh: what it decides, what it repeats and what it says when a step fails.

The script only defines functions when sourced, so each test runs a few lines of bash against a copy in
an empty directory; nothing here downloads or installs.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

GPU_LIST = 'echo "GPU 0: NVIDIA H200 (UUID: GPU-1)"'


@pytest.fixture
def checkout(tmp_path: Path, repository: Path) -> Path:
    """A directory with install.sh, a .venv whose log can be written, and an empty folder of fake commands."""
    shutil.copy(repository / "install.sh", tmp_path)
    (tmp_path / ".venv" / "kt-install").mkdir(parents=True)
    (tmp_path / "bin").mkdir()
    return tmp_path


def fake(checkout: Path, name: str, script: str) -> None:
    """Put a command before all others on the PATH of `bash`."""
    file = checkout / "bin" / name
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)


def bash(checkout: Path, script: str, **variables: str) -> subprocess.CompletedProcess[str]:
    outside = {name: value for name, value in os.environ.items() if not name.startswith("KT_")}
    environment = outside | {"PATH": f"{checkout / 'bin'}:{os.environ['PATH']}"} | variables
    return subprocess.run(
        ["bash", "-c", f"source ./install.sh\n{script}"],
        cwd=checkout,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


# ---- the machine -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nvidia_smi", "node", "kind"),
    [
        (GPU_LIST, "false", "cuda"),
        ("echo 'No devices found.'", "false", "cpu"),
        ("exit 9", "false", "cpu"),  # tools without a driver
        ("exit 9", "true", "cuda"),  # a container with the device and without working tools
    ],
)
def test_gpu_is_found_by_what_works(checkout, nvidia_smi, node, kind):
    fake(checkout, "nvidia-smi", nvidia_smi)
    done = bash(checkout, f"has_nvidia_node() {{ {node}; }}; choose_kind")
    assert done.stdout.strip() == kind


def test_environment_stays_of_the_kind_it_was_made(checkout):
    fake(checkout, "nvidia-smi", GPU_LIST)
    (checkout / ".venv" / "kt-install" / "kind").write_text("cpu\n")
    assert bash(checkout, "choose_kind").stdout.strip() == "cpu"


@pytest.mark.parametrize("option", ["cpu", "cuda"])
def test_option_overrules_the_machine(checkout, option):
    fake(checkout, "nvidia-smi", GPU_LIST if option == "cpu" else "exit 9")
    done = bash(checkout, f'deps() {{ echo "kind=$KIND"; }}; main --{option} deps')
    assert f"kind={option}" in done.stdout


def test_python_that_is_too_old_is_not_used(checkout):
    for name in ("python3", "python3.11", "python3.12", "python3.13"):
        fake(checkout, name, "exit 1")
    done = bash(checkout, "find_python")
    assert done.returncode == 1
    assert "set KT_PYTHON" in done.stderr


def test_python_named_by_the_user_must_fit(checkout):
    done = bash(checkout, "find_python", KT_PYTHON="/does/not/exist")
    assert done.returncode == 1
    assert "KT_PYTHON=/does/not/exist is not a Python of version 3.11 or newer" in done.stderr


@pytest.mark.parametrize("manager", ["apt-get", "dnf", "pacman", "zypper"])
def test_every_package_manager_has_every_name(checkout, manager):
    needs = ("compiler", "pkg-config", "hwloc", "python", "qemu")
    done = bash(checkout, f"for need in {' '.join(needs)}; do package_name {manager} $need; done")
    assert len(done.stdout.split()) == len(needs)
    assert "hwloc" in bash(checkout, f"install_command {manager} hwloc").stdout


def test_without_root_it_says_what_to_run(checkout):
    fake(checkout, "apt-get", "echo must not run >&2; exit 1")
    done = bash(
        checkout, "find_root() { return 1; }; package_manager() { echo apt-get; }; install_packages hwloc"
    )
    assert done.returncode == 1
    assert "run as root: apt-get install -y libhwloc-dev" in done.stderr
    assert "must not run" not in done.stderr


def test_package_lists_are_fetched_when_an_install_needs_them(checkout):
    fake(checkout, "apt-get", 'echo "$1"; [ "$1" = update ] && touch fresh; [ -e fresh ]')
    done = bash(
        checkout, "find_root() { ROOT=(env); }; package_manager() { echo apt-get; }; install_packages hwloc"
    )
    assert done.returncode == 0, done.stderr
    assert (checkout / ".venv/kt-install/log").read_text().split() == ["install", "update", "install"]


# ---- steps -------------------------------------------------------------------------------------


def test_finished_step_is_repeated_only_when_its_inputs_change(checkout):
    done = bash(
        checkout, "work() { echo x >>runs; }; once a k1 T A work; once a k1 T A work; once a k2 T A work"
    )
    assert done.returncode == 0, done.stderr
    assert (checkout / "runs").read_text().split() == ["x", "x"]
    assert done.stdout.count("T: done in") == 2


def test_failed_step_shows_its_output_and_what_to_do_and_is_repeated(checkout):
    script = "work() { echo the-reason; false; echo went-on; }; once a key Compiling 'install g++' work"
    for _ in range(2):
        done = bash(checkout, script)
        assert done.returncode == 1
        assert "the-reason" in done.stderr and "went-on" not in done.stderr
        assert "Compiling failed (exit status 1" in done.stderr
        assert "what to do: install g++" in done.stderr
    assert not (checkout / ".venv/kt-install/a").exists()


def test_step_that_fails_after_a_success_is_not_taken_for_done(checkout):
    script = "once a old T A true; once a new T A false || true; once a old T A touch again"
    bash(checkout, f"set +e; fail() {{ return 1; }}; {script}")
    assert (checkout / "again").exists()


def test_torch_alone_comes_from_the_index_of_its_own(checkout):
    (checkout / "third_party/sglang-0.5.23-cpu").mkdir(parents=True)
    script = 'pip_install() { echo "${PIP_INDEX_URL:-default} $*"; }; install_cpu_deps'
    done = bash(checkout, script, KT_TORCH_INDEX_URL="torch-index", PIP_INDEX_URL="pip-index")
    lines = done.stdout.splitlines()
    assert "torch-index torch==2.13.0" in lines
    assert [line for line in lines if line.startswith("torch-index")] == ["torch-index torch==2.13.0"]
    assert all("--no-deps" in line for line in lines if "torch==" not in line)


def test_build_before_deps_is_refused(checkout):
    done = bash(checkout, "main --cpu build")
    assert done.returncode == 1
    assert "what to do: ./install.sh deps" in done.stderr


def test_change_of_a_source_file_asks_for_a_build(checkout, repository):
    for name in ("csrc", "kt_kernel", "third_party/sglang-0.5.23-cpu", "scripts"):
        (checkout / name).mkdir(parents=True)
    for name in ("pyproject.toml", "CMakeLists.txt", "scripts/build-requirements.lock", "csrc/a.cc"):
        (checkout / name).write_text("1")
    key = "source_files | xargs -0 sha256sum | hash_of"
    before = bash(checkout, key).stdout
    assert bash(checkout, key).stdout == before
    (checkout / "csrc/a.cc").write_text("2")
    assert bash(checkout, key).stdout != before


# ---- packages of the tests ---------------------------------------------------------------------


def with_cuda_packages(checkout: Path, *lines: str) -> None:
    """The list of tests/cuda-packages.lock, and an environment whose Python has a version."""
    (checkout / "tests").mkdir(exist_ok=True)
    (checkout / "tests/requirements.lock").write_text("")
    (checkout / "tests/cuda-packages.lock").write_text("".join(f"{line}\n" for line in lines))
    (checkout / ".venv/bin").mkdir(exist_ok=True)
    python = checkout / ".venv/bin/python"
    python.unlink(missing_ok=True)
    python.symlink_to(sys.executable)


def test_cuda_packages_stay_out_of_the_environment(checkout):
    with_cuda_packages(checkout, "# why", "triton triton==1", "cudart12 runtime==12")
    done = bash(checkout, 'pip_install() { echo "$*" >>calls; }; install_cuda_test_packages')
    assert done.returncode == 0, done.stderr
    assert (checkout / "calls").read_text().splitlines() == [
        "--no-deps --target .venv/kt-cuda/triton triton==1",
        "--no-deps --target .venv/kt-cuda/cudart12 runtime==12",
    ]


def test_cuda_packages_are_installed_once_per_list(checkout):
    script = 'pip_install() { echo "$*" >>calls; }; install_test_tools; install_test_tools'
    calls = {}
    for version in ("1", "2"):
        with_cuda_packages(checkout, f"triton triton=={version}")
        assert bash(checkout, script).returncode == 0
        calls[version] = (checkout / "calls").read_text().count(f"triton=={version}")
    assert calls == {"1": 1, "2": 1}


def test_replaced_cuda_package_leaves_no_file_behind(checkout):
    with_cuda_packages(checkout, "triton triton==2")
    old = checkout / ".venv/kt-cuda/triton/old.py"
    old.parent.mkdir(parents=True)
    old.write_text("")
    assert bash(checkout, "pip_install() { :; }; install_cuda_test_packages").returncode == 0
    assert not old.exists()


def test_index_without_a_cuda_package_is_named_with_a_way_out(checkout):
    with_cuda_packages(checkout, "triton triton==1", "cudart12 runtime==12")
    index = 'case "$*" in *triton*) echo "No matching distribution: $*"; return 1 ;; esac'
    script = f"pip_install() {{ {index}; }}; install_test_tools"
    done = bash(checkout, script)
    assert done.returncode == 1
    assert "No matching distribution: --no-deps --target .venv/kt-cuda/triton triton==1" in done.stderr
    assert "lacks a package of tests/cuda-packages.lock: set PIP_EXTRA_INDEX_URL" in done.stderr
    assert not (checkout / ".venv/kt-install/cuda-packages").exists()


def test_listed_cuda_packages_are_pinned(repository):
    lines = (repository / "tests/cuda-packages.lock").read_text().splitlines()
    packages = dict(line.split() for line in lines if not line.startswith("#"))
    assert sorted(packages) == ["cudart12", "cudart13", "triton"]
    assert all("==" in package for package in packages.values())


# ---- commands ----------------------------------------------------------------------------------


def test_server_options_reach_the_server(checkout):
    (checkout / ".venv/bin").mkdir()
    (checkout / ".venv/bin/kt").write_text('#!/bin/sh\necho "kt $*"\n')
    (checkout / ".venv/bin/kt").chmod(0o755)
    done = bash(checkout, "deps() { :; }; build() { :; }; main --cpu serve --port 31000 --cuda")
    assert done.stdout.splitlines()[-1] == "kt run demo --port 31000 --cuda"


def test_last_line_of_the_tests_is_pytests(checkout):
    with_cuda_packages(checkout)
    (checkout / ".venv/bin/pytest").write_text('#!/bin/sh\necho "== $* passed =="; exit 3\n')
    (checkout / ".venv/bin/pytest").chmod(0o755)
    fake(checkout, "qemu-x86_64", "")
    script = "deps() { :; }; build() { :; }; pip_install() { :; }; main --cpu test -k one"
    done = bash(checkout, script)
    last = done.stdout.splitlines()[-1]
    assert last.startswith("== tests ") and last.endswith(" -k one passed ==")
    assert done.returncode == 3


def test_unknown_command_shows_the_usage(checkout):
    done = bash(checkout, "main --cpu frobnicate")
    assert done.returncode == 1
    assert "usage: ./install.sh" in done.stderr and "there is no command 'frobnicate'" in done.stderr


def test_script_is_clean_for_bash_and_shellcheck(repository):
    scripts = [
        "install.sh",
        ".ci/run",
        "scripts/format.sh",
        "scripts/sanitize.sh",
        "scripts/hooks/pre-commit",
    ]
    for script in scripts:
        assert os.access(repository / script, os.X_OK), script
        subprocess.run(["bash", "-n", script], cwd=repository, check=True)
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([shellcheck, *scripts], cwd=repository, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
