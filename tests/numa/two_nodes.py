"""A machine with two NUMA nodes and uneven cores, emulated in software, and our threads and memory in it.

    apt-get install qemu-system-x86 busybox-static
    apt-get download linux-image-6.1.0-50-cloud-amd64 && dpkg-deb -x linux-image-*.deb kernel
    .venv/bin/python tests/numa/two_nodes.py --kernel kernel/boot/vmlinuz-*

Boots the kernel with this Python, numpy, the built extension and tests/kernels in memory, runs
inside_guest.py and then the tests of thread pools there, and prints what they print. By hand, not in CI: it
takes minutes, and packages that nothing else needs. Exit status 1 if a check fails.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CORES = (3, 1)
MEMORY_MB = 1280  # of each node
SECONDS = 1800
_PACKAGES = (
    "numpy",
    "numpy.libs",
    "gguf",
    "yaml",
    "tqdm",
    "sentencepiece",
    "pytest",
    "_pytest",
    "pluggy",
    "iniconfig",
    "packaging",
    "pygments",
)
_SCENES = ("every_piece_once", "late_workers", "exceptions", "call_from_a_piece")
_POOL_TESTS = (
    *("tests/kernels/test_result_depends_on_the_token_alone.py", "tests/kernels/test_bad_arguments.py"),
    *("-k", "threads_and_pools or warned_about or impossible_engine"),
)
_BEGIN = "the guest begins"
_INIT = """#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /tmp
/bin/busybox mount -t proc none /proc
/bin/busybox mount -t sysfs none /sys
/bin/busybox mount -t devtmpfs none /dev
/bin/busybox mount -t tmpfs none /tmp
export PATH=/bin HOME=/tmp PYTHONHOME={home} PYTHONPATH=/packages PYTHONDONTWRITEBYTECODE=1
export KT_TEST_EXTENSION=/kt/{extension} KT_TEST_SWEEP=small
cd /kt
status=0
echo "{begin}"
{python} tests/numa/inside_guest.py {cores} || status=1
for scene in {scenes}; do
  /kt/thread_pools $scene && echo "holds  scene $scene" || status=1
done
{python} -m pytest -q --color=no -p no:cacheprovider {tests} || status=1
echo "guest ends with $status"
/bin/busybox poweroff -f
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", type=Path, required=True, help="a Linux kernel with NUMA")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        image = folder / "initramfs"
        _write_image(folder / "root", image)
        text = _boot(chosen.kernel, image)
    return 0 if "guest ends with 0" in text else 1


def _boot(kernel: Path, image: Path) -> str:
    """What the guest wrote."""
    nodes, first = [], 0
    for node, cores in enumerate(CORES):
        nodes += ["-object", f"memory-backend-ram,id=m{node},size={MEMORY_MB}M"]
        nodes += ["-numa", f"node,nodeid={node},memdev=m{node},cpus={first}-{first + cores - 1}"]
        first += cores
    machine = [
        "-machine",
        "q35",
        "-accel",
        "tcg,thread=multi",
        "-cpu",
        "max",
        "-smp",
        f"{sum(CORES)},sockets={sum(CORES)}",
    ]
    command = ["qemu-system-x86_64", *machine, "-m", f"{MEMORY_MB * len(CORES)}M", *nodes]
    command += ["-kernel", str(kernel), "-initrd", str(image), "-nographic", "-no-reboot", "-nic", "none"]
    command += ["-append", "console=ttyS0 quiet panic=-1 rdinit=/init"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=SECONDS)
    said = done.stdout[done.stdout.find(_BEGIN) :]
    print(said, done.stderr, sep="\n")
    return said


def _write_image(root: Path, image: Path) -> None:
    from kt_kernel import kt_kernel_ext

    python = Path(sys.executable).resolve()
    home, site = python.parents[1], Path(sysconfig.get_path("purelib"))
    library = home / "lib" / f"python3.{sys.version_info.minor}"
    inside = root / str(library).lstrip("/")
    shutil.copytree(
        library, inside, ignore=shutil.ignore_patterns("site-packages", "test", "__pycache__", "*.a")
    )
    for name in _PACKAGES:
        shutil.copytree(
            site / name, root / "packages" / name, ignore=shutil.ignore_patterns("__pycache__", "tests")
        )
    shutil.copy(site / "py.py", root / "packages")
    shutil.copytree(ROOT / "tests" / "kernels", root / "kt" / "tests" / "kernels")
    shutil.copytree(HERE, root / "kt" / "tests" / "numa")
    extension = Path(kt_kernel_ext.__file__)
    shutil.copy(extension, root / "kt" / extension.name)
    _compile_scenes(root / "kt" / "thread_pools")
    programs = [python, root / "kt" / extension.name, root / "kt" / "thread_pools"]
    _copy(python, root)
    for library in _libraries([*programs, *root.rglob("*.so"), *root.rglob("*.so.*")]):
        _copy(library, root)
    busybox = Path(shutil.which("busybox") or "/bin/busybox")
    (root / "bin").mkdir(exist_ok=True)
    shutil.copy(busybox, root / "bin" / "busybox")
    init = _INIT.format(
        begin=_BEGIN,
        home=home,
        python=python,
        extension=extension.name,
        cores=" ".join(map(str, CORES)),
        scenes=" ".join(_SCENES),
        tests=" ".join(f"'{word}'" for word in _POOL_TESTS),
    )
    (root / "init").write_text(init)
    (root / "init").chmod(0o755)
    with image.open("wb") as file:
        names = subprocess.run(["find", "."], cwd=root, capture_output=True, check=True).stdout
        subprocess.run(
            ["busybox", "cpio", "-o", "-H", "newc"], cwd=root, input=names, stdout=file, check=True
        )


def _compile_scenes(program: Path) -> None:
    core = ROOT / "csrc" / "core"
    sources = [ROOT / "tests/kernels/thread_pools.cc", core / "thread_pool.cc", core / "worker_placement.cc"]
    command = ["c++", "-std=c++17", "-O1", "-pthread", f"-I{core.parent}", "-o", program, *sources]
    subprocess.run(command, check=True)


def _libraries(programs: Iterable[Path]) -> set[Path]:
    """Shared libraries of the system that they are linked with."""
    found: set[Path] = set()
    for program in programs:
        said = subprocess.run(["ldd", program], capture_output=True, text=True).stdout
        found |= {Path(path) for path in re.findall(r"(/\S+) \(0x", said)}
    return found


def _copy(file: Path, root: Path) -> None:
    if file.is_relative_to(root):
        return
    to = root / str(file).lstrip("/")
    to.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(file, to)


if __name__ == "__main__":
    sys.exit(main())
