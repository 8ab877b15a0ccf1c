"""The import stand-ins for machines without a GPU: who gets them, and what they refuse. Each in its own
interpreter.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from server import clean_environment

shims = pytest.importorskip("kt_sglang_cpu_shims", reason="installed only on machines without a GPU")
gate = pytest.importorskip("kt_sglang_cpu_shims.gate")

# Before a program: triton is not installed. (A CUDA build of torch brings it, also where there is no GPU.)
WITHOUT_TRITON = """
from importlib.machinery import PathFinder
def find_spec(name, path=None, target=None, find=PathFinder.find_spec):
    return None if name.partition(".")[0] == "triton" else find(name, path, target)
PathFinder.find_spec = staticmethod(find_spec)
"""


def run(program: str, **environment: str) -> str:
    """Standard output of a Python program in a clean environment."""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**clean_environment(), **environment},
        capture_output=True,
        text=True,
        timeout=480,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("command", "is_sglang"),
    [
        (["python", "-m", "sglang.launch_server", "--model", "m"], True),
        (["python", "-X", "faulthandler", "-u", "-msglang.launch_server"], True),
        (["python", "/opt/venv/bin/sglang", "serve", "m"], True),
        (["python", "-m", "pytest", "-m", "sglang"], False),
        (["python", "-c", "import sglang", "-m", "sglang"], False),
        (["python", "train.py", "-m", "sglang"], False),
        (["python", "-m", "sglangx"], False),
        (["python"], False),
    ],
)
def test_only_sglangs_commands_count(command, is_sglang):
    assert shims.is_sglang_command(command) is is_sglang


def test_other_programs_are_left_alone():
    program = "import sys, os; print(sys.meta_path[-1].__name__, os.environ.get('SGLANG_USE_CPU_ENGINE'))"
    assert run(program) == "PathFinder None"
    assert run(program, KT_SGLANG_CPU_SHIMS="0") == "PathFinder None"
    assert run(program, KT_SGLANG_CPU_SHIMS="1") == "StandInFinder 1"


def test_a_program_that_imports_sglang_gets_them_and_one_that_looks_for_it_does_not():
    program = (
        "import importlib.util, sys\n"
        "importlib.util.find_spec('sglang')\n"
        "print(sys.meta_path[-1].__name__)\n"
        "import sglang\n"
        "print(sys.meta_path[-1].__name__, 'FirstImport' in str(sys.meta_path))"
    )
    assert run(WITHOUT_TRITON + program).splitlines() == ["PathFinder", "StandInFinder False"]


def test_the_user_environment_counts_more():
    program = "import os; print(os.environ['TORCHDYNAMO_DISABLE'], os.environ['SGLANG_USE_CPU_ENGINE'])"
    assert run(program, KT_SGLANG_CPU_SHIMS="1", TORCHDYNAMO_DISABLE="0") == "0 1"


def test_a_machine_with_a_gpu_gets_no_stand_ins(tmp_path):
    node = tmp_path / "nvidiactl"
    node.touch()
    program = (
        "import sys, os, kt_sglang_cpu_shims as shims\n"
        "sys.orig_argv[1:] = ['-m', 'sglang.launch_server']\n"
        f"for nodes in (({str(node)!r},), ()):\n"
        "    shims.GPU_DEVICE_NODES = nodes\n"
        "    shims.on_interpreter_start()\n"
        "    print(sys.meta_path[-1].__name__)\n"
    )
    assert run(program).split() == ["PathFinder", "StandInFinder"]


def test_real_packages_win(tmp_path):
    (tmp_path / "torchvision.py").write_text("REAL = True\n")
    program = "import sglang_like\n"
    (tmp_path / "sglang_like.py").write_text(
        "__name__ = 'sglang.like'\nimport torchvision, triton\n"
        "print(hasattr(torchvision, '__path__'), hasattr(triton, '__path__'))\n"
    )
    assert run(program, KT_SGLANG_CPU_SHIMS="1", PYTHONPATH=str(tmp_path)) == "False True"


def test_probes_of_other_packages_still_say_no():
    program = (
        "import sglang, torch, sys\n"
        "from transformers.utils.import_utils import is_torchvision_available\n"
        "from torch.utils._triton import has_triton_package\n"
        "print('triton' in sys.modules, is_torchvision_available(), has_triton_package())\n"
    )
    printed = run(WITHOUT_TRITON + program, KT_SGLANG_CPU_SHIMS="1")
    assert printed.splitlines()[-1] == "True False False"


def test_calling_a_stand_in_names_the_function_and_the_package(tmp_path):
    (tmp_path / "sglang_like.py").write_text(
        "__name__ = 'sglang.like'\n"
        "import triton, sgl_kernel, triton.language as tl\n"
        "@triton.autotune(configs=[triton.Config({}, num_warps=4)], key=['n'])\n"
        "@triton.jit\n"
        "def kernel(x: tl.tensor, n: tl.constexpr): pass\n"
        "for call in (lambda: kernel[(1,)](0, 1), lambda: sgl_kernel.silu_and_mul(0)):\n"
        "    try:\n"
        "        call()\n"
        "    except RuntimeError as error:\n"
        "        print(error)\n"
        "print(triton.cdiv(7, 2), triton.next_power_of_2(5))\n"
    )
    program = WITHOUT_TRITON + "import sglang_like\n"
    lines = run(program, KT_SGLANG_CPU_SHIMS="1", PYTHONPATH=str(tmp_path)).splitlines()
    assert "sglang.like.kernel was called, but triton" in lines[0]
    assert lines[1].startswith("sgl_kernel.silu_and_mul was called, but sgl_kernel is only a stand-in")
    assert lines[2] == "4 8"


def test_the_add_on_holds_no_gpu_package():
    lock = Path(__file__).parents[2] / "third_party" / "sglang-0.5.23-cpu" / "requirements.lock"
    names = {line.partition("==")[0].lower() for line in lock.read_text().splitlines() if "==" in line}
    assert "sglang" in names
    assert not {
        name for name in names if name in ("torch", "triton", "torchvision") or name.startswith("nvidia")
    }


@pytest.mark.parametrize(
    ("options", "environment", "is_wanted"),
    [
        (["--kt-weight-path", "m"], {}, True),
        (["--kt-weight-path", "m", "--kt-cpu-operators", "on"], {}, True),
        (["--kt-weight-path", "m", "--kt-cpu-operators", "off"], {}, False),
        (["--kt-weight-path", "m", "--kt-cpu-operators=off"], {}, False),
        (["--model-path", "m"], {}, False),
        (["--model-path", "m"], {"KT_CPU_OPERATORS": "on"}, True),
        (["--kt-weight-path", "m"], {"KT_CPU_OPERATORS": "off"}, False),
    ],
)
def test_operators_are_for_servers_with_our_experts(options, environment, is_wanted):
    assert gate.wanted(["python", "-m", "sglang.launch_server", *options], environment) is is_wanted


_GATE = (
    "import kt_sglang_cpu_shims, sys\n"
    "from sglang.srt.utils import cpu_has_amx_support\n"
    "import torch\n"
    "print(cpu_has_amx_support(), hasattr(torch.ops.kt_kernel, 'linear'))"
)


def test_the_gate_is_open_with_our_operators_behind_it_or_shut():
    assert run(_GATE, KT_SGLANG_CPU_SHIMS="1", KT_CPU_OPERATORS="on") == "True True"
    assert run(_GATE, KT_SGLANG_CPU_SHIMS="1", KT_CPU_OPERATORS="off").split()[1] == "False"


def test_a_cpu_without_kernels_leaves_the_gate_shut():
    environment = {"KT_SGLANG_CPU_SHIMS": "1", "KT_CPU_OPERATORS": "on", "KT_KERNEL_CPU_VARIANT": "nonsense"}
    assert run(_GATE, **environment).split()[1] == "False"
