"""The plug-in inside SGLang: its hooks prove themselves, and `sglang.Engine` takes the same flags."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

from server import clean_environment


def run(*command: object) -> list[str]:
    """The lines of standard output of `python *command`, a program that imports SGLang."""
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.splitlines()


def test_a_hook_without_effect_is_found_and_named():
    program = """
from sglang.srt.plugins import load_plugins
load_plugins()
from kt_kernel.integrations.sglang import hooking
hooking.verify()
print(len(hooking._registered))
for hook in hooking._registered:
    owner, _, name = hook.target.rpartition(".")
    owner = hooking.pkgutil.resolve_name(owner)
    hooked = owner.__dict__[name]
    setattr(owner, name, object())
    try:
        hooking.verify.__wrapped__()
        print("NOT FOUND", hook.target)
    except hooking.HookError as error:
        print(hook.target in str(error) and "0.5.23" in str(error))
    setattr(owner, name, hooked)
hooking.verify.__wrapped__()
"""
    count, *found = run("-c", program)
    assert len(found) == int(count) >= 4
    assert set(found) == {"True"}


def test_a_target_that_is_gone_is_found():
    program = """
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from sglang.srt.plugins import load_plugins
load_plugins()
from kt_kernel.integrations.sglang import hooking
gone = "sglang.srt.server_args.NoSuchClass.method"
hooking.register((hooking.Hook(gone, HookType.AFTER, print, "of this test"),))
HookRegistry.apply_hooks()
try:
    hooking.verify()
except hooking.HookError as error:
    print(error)
"""
    (sentence,) = run("-c", program)
    assert "sglang.srt.server_args.NoSuchClass.method (needed because of this test)" in sentence


ENGINE = """
import json, sys
import sglang
if __name__ == "__main__":
    model, kt = sys.argv[1], json.loads(sys.argv[2])
    engine = sglang.Engine(model_path=model, dtype="float32", **kt)
    sampling = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}
    for answer in engine.generate(["The keeper", "Water boils at"], sampling):
        print(json.dumps(answer["output_ids"]))
    engine.shutdown()
"""


def test_engine_takes_the_flags_as_arguments(tiny_checkpoint, tmp_path: Path):
    """Experts on the device by a ratio, at random places: slots differ from expert numbers everywhere."""
    model = tiny_checkpoint("glm4_moe")
    # Processes that multiprocessing spawns import the main module again, so it must be a file.
    program = tmp_path / "use_engine.py"
    program.write_text(ENGINE)
    kt = {"kt_weight_path": str(model), "kt_method": "BF16", "kt_cpuinfer": 2, "kt_numa_nodes": [0]}
    placed = kt | {"kt_gpu_experts_ratio": 0.4, "kt_expert_placement_strategy": "random"}
    on_cpu, spread = (run(program, model, json.dumps(options)) for options in (kt, placed))
    assert on_cpu[-2:] == spread[-2:]
    assert len(json.loads(on_cpu[-1])) == 12


def test_example_of_the_documentation_runs(tiny_checkpoint, tmp_path: Path):
    page = Path(__file__).parents[2] / "doc/python.md"
    examples = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    (example,) = (text for text in examples if "Engine(" in text)
    model = tiny_checkpoint("qwen3_moe")
    program = tmp_path / "example.py"
    program.write_text(
        example.replace("/models/Qwen3-30B-A3B", str(model))
        + "    from kt_kernel.integrations.sglang import cpu_operators\n    print(cpu_operators.is_open())\n"
    )
    answer, *_, operators = run(program)
    assert answer and operators == str(has_stand_ins())


def has_stand_ins() -> bool:
    return importlib.util.find_spec("kt_sglang_cpu_shims") is not None
