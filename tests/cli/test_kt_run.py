"""`kt run` must build the command that was meant, and refuse what cannot work before anything starts."""

from __future__ import annotations

import importlib.util
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kt_kernel.cli import run, start
from kt_kernel.cli.errors import CommandError
from kt_kernel.cli.machine import Machine, server_environment, this_machine
from kt_kernel.cli.main import app
from kt_kernel.cli.model import Model, local_model
from kt_kernel.machine_limits import Limits
from kt_kernel.planning import this_machine as this_machine_facts
from kt_kernel.planning.user_options import last_value

MODEL = Model(Path("/models/mixtral"), "mixtral", dtype=None)
MACHINE = Machine(threads=6, numa_nodes=[0, 1])
MOE_CONFIG = {"model_type": "qwen3_moe", "num_experts": 128}


def kt(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


def values(command: list[str], flag: str) -> list[str]:
    return [command[i + 1] for i, word in enumerate(command) if word == flag]


def checkpoint(directory: Path, config: object) -> Path:
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_defaults_use_the_whole_machine():
    command = run.server_command(MODEL, MACHINE, [])
    assert command[:3] == [sys.executable, "-m", "sglang.launch_server"]
    assert "--dtype" not in command
    for flag, value in {
        "--model-path": "/models/mixtral",
        "--kt-weight-path": "/models/mixtral",
        "--kt-method": "AUTO",
        "--kt-cpuinfer": "6",
        "--kt-threadpool-count": "2",
        "--kt-num-gpu-experts": "0",
        "--host": "127.0.0.1",
        "--port": "30000",
    }.items():
        assert values(command, flag) == [value], flag


@pytest.mark.parametrize(
    "options", [["--port", "31000"], ["--port=31000"], ["--host", "::1", "--port", "1", "--port", "31000"]]
)
def test_the_users_port_replaces_ours(options):
    command = run.server_command(MODEL, MACHINE, options)
    assert command[-len(options) :] == options
    assert "30000" not in command
    assert last_value(command, "--port") == "31000"


def test_short_name_of_the_model_option_counts_as_given():
    command = run.server_command(MODEL, MACHINE, ["--model", "/other"])
    assert "--model-path" not in command


def test_named_numa_nodes_are_not_contradicted():
    command = run.server_command(MODEL, MACHINE, ["--kt-numa-nodes", "1"])
    assert "--kt-threadpool-count" not in command


def test_nodes_that_are_not_the_first_are_named():
    command = run.server_command(MODEL, Machine(4, [2, 3]), [])
    at = command.index("--kt-numa-nodes")
    assert command[at + 1 : at + 3] == ["2", "3"]
    assert values(command, "--kt-threadpool-count") == ["2"]


def test_unknown_options_reach_the_server_in_order(tmp_path):
    model = checkpoint(tmp_path, MOE_CONFIG)
    options = ["--kt-max-deferred-experts-per-token", "2", "--tp", "1", "--log-level=info", "-x"]
    result = kt("run", str(model), *options, "--dry-run")
    assert result.exit_code == 0, result.output
    assert shlex.split(result.stdout)[-len(options) :] == options


def test_dry_run_of_the_demo_builds_nothing(empty_cache):
    result = kt("run", "demo", "--dry-run")
    assert result.exit_code == 0, result.output
    command = shlex.split(result.stdout)
    assert values(command, "--served-model-name") == ["demo"]
    assert values(command, "--dtype") == ["float32"]
    assert values(command, "--kt-cpuinfer") == [str(this_machine().threads)]
    assert not empty_cache.exists()


def test_exit_status_is_the_servers(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(start, "run_until_stopped", lambda *arguments: started.append(arguments) or 3)
    monkeypatch.setattr(run, "this_machine", lambda: MACHINE)
    result = kt("run", str(checkpoint(tmp_path, MOE_CONFIG)), "--port", "31000")
    assert result.exit_code == 3
    [(command, environment)] = started
    assert values(command, "--port") == ["31000"]
    assert environment == server_environment()


@pytest.mark.parametrize(("installed", "switch"), [(True, "1"), (False, None)])
def test_cpu_installation_stays_on_the_cpu_beside_a_gpu(monkeypatch, installed, switch):
    monkeypatch.delenv("KT_SGLANG_CPU_SHIMS", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if installed else None)
    assert server_environment().get("KT_SGLANG_CPU_SHIMS") == switch


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "holds no config.json"),
        ([1, 2], "holds a list, expected an object"),
        ({"model_type": "llama"}, r"\(llama\) names no routed experts"),
    ],
)
def test_directory_that_is_no_mixture_of_experts_is_refused(tmp_path, config, message):
    if config is not None:
        checkpoint(tmp_path, config)
    with pytest.raises(CommandError, match=message):
        local_model(str(tmp_path))


def test_broken_config_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(CommandError, match=r"config\.json cannot be read"):
        local_model(str(tmp_path))


def test_missing_directory_is_one_sentence():
    result = kt("run", "/does/not/exist")
    assert result.exit_code == 1
    assert result.stderr.startswith("kt: There is no directory '/does/not/exist'")
    assert "Traceback" not in result.output


def test_method_and_weights_can_be_named():
    command = run.server_command(MODEL, MACHINE, ["--kt-weight-path", "/converted", "--kt-method", "FP8"])
    assert values(command, "--kt-weight-path") == ["/converted"]
    assert values(command, "--kt-method") == ["FP8"]


def test_option_before_the_model_is_not_taken_for_the_model():
    result = kt("run", "--port", "31000", "demo", "--dry-run")
    assert result.exit_code == 2
    assert "the model comes first" in result.stderr


def test_help_does_not_wait_for_torch():
    code = "import sys, kt_kernel.cli.main; sys.exit('torch' in sys.modules or 'sglang' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- names, plans and refusals -----------------------------------------------------------------------


@pytest.fixture
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No settings, models or caches of whoever runs the tests; nothing is measured."""
    for name in ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    limits = Limits(30e9, 4e11, 8e11)
    monkeypatch.setattr(this_machine_facts, "measure", lambda native, threads: limits)
    monkeypatch.setattr(this_machine_facts, "usable_memory", lambda: (10**11, 10**11))
    return tmp_path


def in_hub_cache(home: Path, hub_id: str) -> Path:
    """An (empty) model where huggingface-hub would have put it."""
    repository = home / "cache" / "huggingface" / "hub" / ("models--" + hub_id.replace("/", "--"))
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").write_bytes(b"")
    return checkpoint(snapshot, MOE_CONFIG)


@pytest.mark.parametrize("name", ["Qwen/Qwen3-30B-A3B", "qwen3-30b"])
def test_model_that_is_not_here_is_answered_with_the_download_command(own_home, name):
    result = kt("run", name)
    assert result.exit_code == 1
    assert "kt model download Qwen/Qwen3-30B-A3B" in result.stderr


def test_unknown_hub_id_is_answered_with_the_download_command(own_home):
    result = kt("run", "somebody/Something-MoE", "--dry-run")
    assert result.exit_code == 1
    assert "kt model download somebody/Something-MoE gets it" in result.stderr


@pytest.mark.parametrize("name", ["Qwen/Qwen3-30B-A3B", "qwen3-30b"])
def test_downloaded_model_is_found_by_hub_id_and_alias(own_home, name):
    snapshot = in_hub_cache(own_home, "Qwen/Qwen3-30B-A3B")
    command = shlex.split(kt("run", name, "--dry-run").stdout)
    assert values(command, "--model-path") == [str(snapshot)]
    assert values(command, "--served-model-name")[0].lower() in ("qwen3-30b-a3b", "qwen3-30b")


def test_plan_can_be_seen_before_the_download(own_home):
    result = kt("run", "qwen3-30b", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "experts (BF16)" in result.stderr and "58.0 GB" in result.stderr
    assert "kt model download Qwen/Qwen3-30B-A3B" in result.stderr
    command = shlex.split(result.stdout)
    assert values(command, "--tool-call-parser") == ["qwen25"]
    assert values(command, "--reasoning-parser") == ["qwen3"]


def test_json_has_the_plan_and_the_command(own_home):
    made = json.loads(kt("run", "qwen3-30b", "--dry-run", "--json", "--port", "31000").stdout)
    assert made["command"][-2:] == ["--port", "31000"]
    assert made["facts"]["method"] == "BF16"
    assert {row["place"] for row in made["placement"]} == {"RAM"}
    assert made["decode"]["tokens_per_second"] > 0
    assert kt("run", "demo", "--json").exit_code == 2


def test_what_does_not_fit_is_refused_before_anything_starts(own_home, monkeypatch):
    monkeypatch.setattr(start, "run_until_stopped", lambda *arguments: pytest.fail("started"))
    result = kt("run", "deepseek-v3", "--dry-run")
    assert result.exit_code == 1
    assert result.stderr.count("\n") <= 2
    assert "It does not fit: main memory needs" in result.stderr and "too little" in result.stderr
    forced = kt("run", "deepseek-v3", "--dry-run", "--force")
    assert forced.exit_code == 0
    assert values(shlex.split(forced.stdout), "--tool-call-parser") == ["deepseekv3"]


def test_plan_that_cannot_be_made_does_not_keep_the_server_from_starting(own_home, monkeypatch):
    started = []
    monkeypatch.setattr(start, "run_until_stopped", lambda *arguments: started.append(arguments) or 0)
    folder = own_home / "model"
    folder.mkdir()
    result = kt("run", str(checkpoint(folder, MOE_CONFIG)))
    assert result.exit_code == 0
    assert len(started) == 1
    assert "kt: no plan: " in result.stderr


def configure(home: Path, text: str) -> None:
    settings = home / "config" / "kt-kernel" / "config.yaml"
    settings.parent.mkdir(parents=True)
    settings.write_text(text)


def test_settings_of_kt_config_stand_behind_the_command_line(own_home):
    configure(own_home, "port: 31000\nthreads: 1\nrun.options: --log-level info\n")
    command = shlex.split(kt("run", "qwen3-30b", "--dry-run", "--log-level", "debug").stdout)
    assert values(command, "--port") == ["31000"]
    assert values(command, "--kt-cpuinfer") == ["1"]
    assert values(command, "--log-level") == ["info", "debug"]


def test_run_options_of_kt_config_win_over_its_plain_settings(own_home):
    configure(own_home, "port: 32000\nthreads: 1\nrun.options: --port 31000 --kt-cpuinfer=2\n")
    command = shlex.split(kt("run", "qwen3-30b", "--dry-run").stdout)
    assert values(command, "--port") == ["31000"]
    assert [word for word in command if "--kt-cpuinfer" in word] == ["--kt-cpuinfer=2"]
