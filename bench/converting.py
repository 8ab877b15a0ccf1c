"""The converter against its limits: the disk, the quantiser, its memory, and kills at random moments.

    python bench/converting.py                         # 2 GB of bf16 and the same in fp8 -> int8, int4
    python bench/converting.py --gb 0.5 --folder /mnt/disk
    python bench/converting.py --kills 20              # SIGKILL at random moments: the same bytes after all?

Medians. `ratio`: the time of the whole conversion, without importing torch, over reading the input + writing
the output + quantising in memory, each measured alone with nothing of the input cached. `layers`: the peak
of the process's memory above what it had before, in layers of input.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from kt_kernel import kt_kernel_ext
from kt_kernel.convert.job import Conversion, convert
from kt_kernel.convert.matrix import content_hash
from kt_kernel.convert.quantise import quantise_matrix
from kt_kernel.convert.source import SourceLayer, source_layers
from kt_kernel.convert.targets import target
from kt_kernel.threads import usable_cores

EXPERTS, HIDDEN, INTERMEDIATE = 32, 2048, 768
CHUNK = 16 << 20

# The child prints one JSON line: seconds of work, memory before it and at its peak, in bytes.
_CHILD = """
import json, resource, sys, time
from pathlib import Path
import kt_kernel.convert.settings
from kt_kernel.convert.job import Conversion, convert
from kt_kernel.convert.targets import target
source, output, method, group, threads = sys.argv[1:]
before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
Path("/proc/self/clear_refs").write_text("5")  # the peak of importing torch is forgotten
begin = time.monotonic()
convert(Conversion(Path(source), Path(output), target(method, int(group)), int(threads)))
seconds, peak = time.monotonic() - begin, Path("/proc/self/status").read_text().partition("VmHWM:")[2]
print(json.dumps([seconds, before, int(peak.split()[0]) * 1024]))
"""


def write_checkpoint(folder: Path, kind: str, total_bytes: float) -> int:
    """Layers of 32 experts as in a third of Qwen3-30B-A3B; returns the bytes of one layer."""
    folder.mkdir(parents=True)
    numbers = torch.randn(1 << 22, generator=torch.Generator().manual_seed(3)) / 50
    bytes_each = 2 if kind == "bf16" else 1
    layer_bytes = 3 * EXPERTS * HIDDEN * INTERMEDIATE * bytes_each
    for layer in range(max(2, round(total_bytes / layer_bytes))):
        tensors: dict[str, torch.Tensor] = {}
        for expert in range(EXPERTS):
            for place, name in enumerate(("gate_proj", "up_proj", "down_proj")):
                n, k = (HIDDEN, INTERMEDIATE) if name == "down_proj" else (INTERMEDIATE, HIDDEN)
                begin = (layer * 131 + expert * 17 + place * 7) * 1024
                matrix = numbers[begin : begin + n * k].view(n, k)
                tensor_name = f"model.layers.{layer}.mlp.experts.{expert}.{name}.weight"
                if kind == "fp8":
                    tensors[tensor_name] = (matrix * 4000).to(torch.float8_e4m3fn)
                    tensors[f"{tensor_name}_scale_inv"] = torch.full((n // 128, k // 128), 1 / 4000)
                else:
                    tensors[tensor_name] = matrix.bfloat16()
        save_file(tensors, folder / f"model-{layer:05d}.safetensors")
    (folder / "config.json").write_text(json.dumps({"num_experts": EXPERTS}))
    return layer_bytes


def forget(folder: Path) -> None:
    """Take the files out of the system's cache."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def seconds_to_read(folder: Path) -> float:
    forget(folder)
    buffer = bytearray(CHUNK)
    begin = time.monotonic()
    for path in folder.iterdir():
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.monotonic() - begin


def seconds_to_write(folder: Path, like: Path) -> float:
    """As many files of as many bytes, each made durable."""
    octets = random.Random(5).randbytes(CHUNK)
    begin = time.monotonic()
    for path in like.glob("model-layer-*"):
        with (folder / path.name).open("wb", buffering=0) as file:
            for start in range(0, path.stat().st_size, CHUNK):
                file.write(octets[: min(CHUNK, path.stat().st_size - start)])
            os.fsync(file.fileno())
    return time.monotonic() - begin


def quantising_speed(layer: SourceLayer, method: str, group: int) -> float:
    """Bytes of input per second on one core, with the hash of the source, from memory."""
    chosen = target(method, group)
    torch.set_num_threads(1)
    with layer.opened() as expert:
        matrices = [matrix for number in range(8) for _, matrix in expert(number).matrices()]
        best = float("inf")
        for _ in range(3):
            begin = time.thread_time()
            for matrix in matrices:
                content_hash(matrix)
                quantise_matrix(matrix, chosen)
            best = min(best, time.thread_time() - begin)
        return sum(part.nbytes for matrix in matrices for part in matrix.parts) / best


def measure(folder: Path, kind: str, total_bytes: float, threads: int, repeats: int) -> None:
    source, output, copy = folder / kind, folder / "output", folder / "copy"
    layer_bytes = write_checkpoint(source, kind, total_bytes)
    stored = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    for method, group in (("int8", 0), ("int4", 0), ("int4", 32)):
        speed = quantising_speed(source_layers(source)[0], method, group)
        rounds = []
        for _ in range(repeats):
            seconds, bytes_used = run(source, output, method, group, threads)
            copy.mkdir()
            rounds.append((seconds, seconds_to_read(source), seconds_to_write(copy, output), bytes_used))
            shutil.rmtree(output)
            shutil.rmtree(copy)
        seconds, read, written, bytes_used = (
            statistics.median(column) for column in zip(*rounds, strict=True)
        )
        least = read + written + stored / speed / threads
        print(
            f"{kind} -> {method}, group {group:3}: quantising {speed / 1e9:5.2f} GB/s a core; "
            f"whole {seconds:6.2f} s, ratio {seconds / least:4.2f} (read {read:.2f}, write {written:.2f} s); "
            f"peak {bytes_used / 1e6:4.0f} MB = {bytes_used / layer_bytes:4.2f} layers",
            flush=True,
        )
    shutil.rmtree(source)


def run(source: Path, output: Path, method: str, group: int, threads: int) -> tuple[float, int]:
    """Seconds of a conversion whose input is not cached, and the memory that it needed."""
    forget(source)
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, source, output, method, str(group), str(threads)],
        capture_output=True,
        text=True,
        check=True,
    )
    seconds, before, peak = json.loads(done.stdout)
    return seconds, peak - before


def files(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def kill_and_continue(folder: Path, kills: int, seed: int, threads: int) -> int:
    """Exit status: 1 if the files differ from those of a conversion that was left alone."""
    source, whole, output = folder / "killed", folder / "whole", folder / "output"
    write_checkpoint(source, "bf16", 1e9)
    begin = time.monotonic()
    convert(Conversion(source, whole, target("int8", 0), threads))
    usual = time.monotonic() - begin
    moments, landed, unfinished = random.Random(seed), 0, 0
    while landed < kills:
        command = [sys.executable, "-c", _CHILD, source, output, "int8", "0", str(threads)]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as child:
            child.stderr.readline()  # the first line of its progress: it has begun
            time.sleep(moments.uniform(0, usual / 2))
            child.send_signal(signal.SIGKILL)
        landed += child.returncode == -signal.SIGKILL
        unfinished += bool(list(output.glob(".*.partial")))
        shards = sorted(output.glob("model-layer-*"))
        for _ in range(len(shards) - 1):  # leave work for the next kill
            shards.pop(moments.randrange(len(shards))).unlink()
    convert(Conversion(source, output, target("int8", 0), threads))
    same = files(output) == files(whole)
    print(
        f"{landed} kills, {unfinished} in the middle of a shard; files {'are the same' if same else 'DIFFER'}"
    )
    return 0 if same else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gb", type=float, default=2.0, help="of bf16 input (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: a temporary one)")
    parser.add_argument("--threads", type=int, default=usable_cores(kt_kernel_ext.topology()))
    parser.add_argument("--repeats", type=int, default=3, help="medians are shown (default: %(default)s)")
    parser.add_argument("--kills", type=int, default=0, help="kill a conversion so many times instead")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        if options.kills:
            return kill_and_continue(folder, options.kills, options.seed, options.threads)
        for kind, share in (("bf16", 1.0), ("fp8", 0.5)):
            measure(folder, kind, options.gb * 1e9 * share, options.threads, options.repeats)
    return 0


if __name__ == "__main__":
    sys.exit(main())
