"""Small defects, made on purpose in a copy of the package: do the tests that should see each one fail?

    .venv/bin/python scripts/mutants.py               # all; one to two minutes each on a free core
    .venv/bin/python scripts/mutants.py update 3      # those whose file has "update" in its name; every third

Exit status 1 if one survives. A defect of C++ would need a build of its own, so these are Python's.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 180


# An editable installation leads every import to its sources, before any path is looked at.
WITHOUT_THE_INSTALLED_ONE = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if not type(finder).__module__.startswith("_editable")]
"""


@dataclass(frozen=True)
class Mutant:
    """`before` stands once in `file`; the tests at `tests` must fail where `after` stands in its place."""

    file: str
    before: str
    after: str
    tests: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.file}: {self.before.strip()!r} -> {self.after.strip()!r}"


UPDATE = ("tests/hybrid/test_update.py",)
MISSES = ("tests/hybrid/test_misses.py",)
GROUPS = ("tests/api/test_api_group_size.py",)
FILES = ("tests/api/test_api_hostile_files.py",)
CHECKPOINT = ("tests/api/test_api_checkpoint.py",)
METHOD = ("tests/serving/test_moe_method.py",)
PROBE = ("tests/transformers/test_activation_probe.py",)
OWN_FILES = ("tests/cli/test_server_files.py",)
KEY = ("tests/cli/test_server_key.py",)
STATISTICS = ("tests/hybrid/test_statistics.py", *UPDATE)

MUTANTS = (
    Mutant("hybrid/update.py", "        copied.wait()\n", "", UPDATE),
    Mutant(
        "hybrid/update.py",
        "        layer.statistics.settle(layer.placement.tables(self._context.device))\n"
        "        layer.placement.switch(new)\n",
        "        layer.placement.switch(new)\n"
        "        layer.statistics.settle(layer.placement.tables(self._context.device))\n",
        UPDATE,
    ),
    Mutant(
        "hybrid/update.py",
        "if state == _RUNNING:\n            return False",
        "if False:\n            pass",
        UPDATE,
    ),
    Mutant("hybrid/update.py", "        self._planned.clear()\n", "", UPDATE),
    Mutant("hybrid/update.py", "elif self._steps >= interval:", "elif self._steps > interval:", UPDATE),
    Mutant("hybrid/misses.py", "if seconds < best_seconds:", "if seconds <= best_seconds:", MISSES),
    Mutant("hybrid/misses.py", "(-costs[expert], expert)", "(-costs[expert], -expert)", MISSES),
    Mutant("hybrid/misses.py", "dearest[:most]", "dearest[: most + 1]", MISSES),
    Mutant("hybrid/misses.py", "max(on_cpu, fetched", "min(on_cpu, fetched", MISSES),
    Mutant("hybrid/statistics.py", "        self._settled.copy_(now)\n", "", STATISTICS),
    Mutant("checkpoint/group_size.py", '("moe_intermediate_size", intermediate)', "", GROUPS),
    Mutant("checkpoint/group_size.py", '("hidden_size", hidden), ', "", GROUPS),
    Mutant("checkpoint/group_size.py", "        if groups > 1:\n", "        if True:\n", GROUPS),
    Mutant("checkpoint/safetensors_file.py", "    _check_disjoint(path, tensors)\n", "", FILES),
    Mutant(
        "checkpoint/safetensors_file.py",
        "following.begin < info.end",
        "following.begin + 1 < info.end",
        FILES,
    ),
    Mutant(
        "checkpoint/safetensors_file.py", "following.begin < info.end", "following.begin <= info.end", FILES
    ),
    Mutant("checkpoint/safetensors_file.py", "        if name in found:\n", "        if False:\n", FILES),
    Mutant("checkpoint/safetensors_file.py", "    if info.end > size:\n", "    if False:\n", CHECKPOINT),
    Mutant("checkpoint/safetensors_file.py", "if data_begin > size:", "if False:", CHECKPOINT),
    Mutant("checkpoint/reader.py", "not os.path.normpath(path).startswith(", "(lambda _: False)(", FILES),
    Mutant("checkpoint/mapped_file.py", "flags | os.O_NONBLOCK", "flags", FILES),
    Mutant("checkpoint/mapped_file.py", "if not stat.S_ISREG(mode):", "if False:", FILES),
    Mutant("checkpoint/mapped_file.py", "watch is not None and watch.cut_off", "False", FILES),
    Mutant("integrations/sglang/moe_method.py", "layer.moe_ep_size != 1", "False", METHOD),
    Mutant("integrations/sglang/moe_method.py", "layer.num_fused_shared_experts > 0", "False", METHOD),
    Mutant("integrations/sglang/moe_method.py", 'config.activation != "silu"', "False", METHOD),
    Mutant("integrations/sglang/moe_method.py", "not config.is_gated", "False", METHOD),
    Mutant("integrations/sglang/moe_method.py", "config.gemm1_beta not in (None, 1.0)", "False", METHOD),
    Mutant("integrations/sglang/moe_method.py", "(config.apply_router_weight_on_input,", "(False,", METHOD),
    Mutant("integrations/sglang/moe_method.py", "        return factor\n", "        return 1.0\n", METHOD),
    Mutant(
        "integrations/sglang/moe_method.py", " or layer.should_fuse_routed_scaling_factor_in_topk", "", METHOD
    ),
    Mutant("integrations/transformers/activations.py", "-100.0, -3.0", "-5.0, -3.0", PROBE),
    Mutant("integrations/transformers/activations.py", "3.0, 100.0", "3.0, 5.0", PROBE),
    Mutant(
        "integrations/transformers/experts.py",
        "(hidden_states.requires_grad or top_k_weights.requires_grad)",
        "hidden_states.requires_grad",
        ("tests/transformers/test_patch_errors.py",),
    ),
    Mutant("server_files.py", "            _remove(folder)\n", "", OWN_FILES),
    Mutant(
        "server_files.py",
        "fcntl.LOCK_EX | fcntl.LOCK_NB)\n    except",
        "fcntl.LOCK_SH)\n    except",
        OWN_FILES,
    ),
    Mutant("server_files.py", "not _OURS.fullmatch(folder.name) or ", "", OWN_FILES),
    Mutant("server_files.py", " or not _is_private(status)", "", OWN_FILES),
    Mutant("cli/server_key.py", 'KEY: key, KEY_FILE: ""', "KEY: key", KEY),
    Mutant("cli/server_key.py", 'skip = not skip and "=" not in option', "skip = not skip", KEY),
)


def main() -> int:
    """Prints a line for each mutant."""
    part, step = [*sys.argv[1:], *("", "1")[len(sys.argv) - 1 :]]
    chosen = [mutant for mutant in MUTANTS if part in mutant.file][:: int(step)]
    survivors = 0
    with tempfile.TemporaryDirectory() as folder:
        tree = copy_of_package(Path(folder))
        for mutant in chosen:
            killed = is_killed(tree, mutant)
            survivors += not killed
            print("killed  " if killed else "SURVIVES", mutant, flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} killed ({1 - survivors / max(1, len(chosen)):.0%})")
    return 1 if survivors else 0


def copy_of_package(folder: Path) -> Path:
    """The sources and the tests with the extension beside them: what stands there is imported."""
    for name in ("kt_kernel", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    import kt_kernel.kt_kernel_ext as extension

    shutil.copy(extension.__file__, folder / "kt_kernel")
    (folder / "sitecustomize.py").write_text(WITHOUT_THE_INSTALLED_ONE)
    return folder


def is_killed(tree: Path, mutant: Mutant) -> bool:
    path = tree / "kt_kernel" / mutant.file
    original = path.read_text()
    if original.count(mutant.before) != 1:
        raise ValueError(f"{mutant}: it stands there {original.count(mutant.before)} times, expected 1")
    path.write_text(original.replace(mutant.before, mutant.after))
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *mutant.tests]
    try:
        environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(
            command, cwd=tree, env=environment, capture_output=True, text=True, timeout=SECONDS
        )
        if done.returncode not in (0, 1):
            raise RuntimeError(f"{mutant}: pytest ended with {done.returncode}:\n{done.stdout[-2000:]}")
        return done.returncode == 1
    except subprocess.TimeoutExpired:
        return True
    finally:
        path.write_text(original)


if __name__ == "__main__":
    sys.exit(main())
