"""Small defects, made on purpose in a copy of the package: do the tests that should see each one fail?

    .venv/bin/python scripts/mutants                  # all; half a minute each on a free core
    .venv/bin/python scripts/mutants hybrid/update 3  # "hybrid/update" in the path; every third of those

The tests must pass without the defect first. Exit status 1 if a defect survives, or could not be tried. Those
of C++ are compiled into a copy of the extension: they need a build of the sources (./install.sh build).
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from extension import Build
from mutant import Mutant
from native_core import MUTANTS as NATIVE_CORE
from native_kernels import MUTANTS as NATIVE_KERNELS
from python_integrations import MUTANTS as PYTHON_INTEGRATIONS
from python_package import MUTANTS as PYTHON_PACKAGE

ROOT = Path(__file__).resolve().parents[2]
MUTANTS = (*NATIVE_KERNELS, *NATIVE_CORE, *PYTHON_PACKAGE, *PYTHON_INTEGRATIONS)
SECONDS = 300
HANGS = f"hangs: more than {SECONDS} s"

# An editable installation leads every import to its sources, before any path is looked at.
WITHOUT_THE_INSTALLED_ONE = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if not type(finder).__module__.startswith("_editable")]
"""


def main() -> int:
    """Prints a line for each mutant."""
    part, step = [*sys.argv[1:], *("", "1")[len(sys.argv) - 1 :]]
    chosen = [mutant for mutant in MUTANTS if part in mutant.path][:: int(step)]
    survivors = 0
    with tempfile.TemporaryDirectory() as folder:
        tree = Tree(Path(folder))
        for mutant in chosen:
            try:
                seen = tree.seen(mutant)
                print(f"killed   {mutant} ({seen})" if seen else f"SURVIVES {mutant}", flush=True)
            except (ValueError, RuntimeError) as error:
                seen = None
                print(f"NOT RUN  {error}", flush=True)
            survivors += seen is None
    print(f"{len(chosen) - survivors} of {len(chosen)} killed ({1 - survivors / max(1, len(chosen)):.1%})")
    return 1 if survivors else 0


class Tree:
    """A copy of the sources and the tests with the extension beside them: what stands there is imported."""

    def __init__(self, folder: Path) -> None:
        import kt_kernel.kt_kernel_ext as extension

        self._folder = folder
        for name in ("kt_kernel", "tests", "csrc", "scripts"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", folder)
        self._whole = Path(extension.__file__)
        self._extension = folder / "kt_kernel" / self._whole.name
        shutil.copy(self._whole, self._extension)
        (folder / "sitecustomize.py").write_text(WITHOUT_THE_INSTALLED_ONE)
        self._seconds: dict[tuple[str, ...], float] = {}  # of tests that passed

    def seen(self, mutant: Mutant) -> str | None:
        """How the tests fail with it, if they do; ValueError where that cannot be told."""
        unbroken = self._unbroken_seconds(mutant)
        path = self._folder / mutant.path
        original = path.read_text()
        if original.count(mutant.before) != 1:
            raise ValueError(f"{mutant}: it stands there {original.count(mutant.before)} times, expected 1")
        path.write_text(original.replace(mutant.before, mutant.after))
        try:
            if mutant.compiled:
                self._extension.unlink()  # a process may still have it mapped
                Build(ROOT).link(self._folder, mutant.compiled, self._extension)
            failure = self._failure(mutant)
        finally:
            path.write_text(original)
            if mutant.compiled:
                self._extension.unlink(missing_ok=True)
                shutil.copy(self._whole, self._extension)
        if failure == HANGS and unbroken > SECONDS / 3:
            raise ValueError(f"{mutant}: no hang can be told, its tests take {unbroken:.0f} s without it")
        return failure

    def _unbroken_seconds(self, mutant: Mutant) -> float:
        """Of its tests without the defect; ValueError where they fail."""
        if mutant.tests not in self._seconds:
            begin = time.monotonic()
            if failure := self._failure(mutant):
                raise ValueError(f"{mutant.tests}: they do not pass here without any defect ({failure})")
            self._seconds[mutant.tests] = time.monotonic() - begin
        return self._seconds[mutant.tests]

    def _failure(self, mutant: Mutant) -> str | None:
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *mutant.tests]
        environment = os.environ | {"PYTHONPATH": str(self._folder), "PYTHONDONTWRITEBYTECODE": "1"}
        if any(source.startswith("kernels/avx2/") for source in mutant.compiled):
            environment["KT_KERNEL_CPU_VARIANT"] = "avx2"
        with subprocess.Popen(
            command,
            cwd=self._folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        ) as process:
            try:
                said, _ = process.communicate(timeout=SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # the processes of the tests, too
                return HANGS
        # 4 and 5: no such test. A negative status is a signal.
        if process.returncode in (4, 5):
            raise RuntimeError(f"{mutant}: pytest ended with {process.returncode}:\n{said[-2000:]}")
        if process.returncode == 0:
            return None
        return "failed" if process.returncode == 1 else f"pytest ended with {process.returncode}"


if __name__ == "__main__":
    sys.exit(main())
