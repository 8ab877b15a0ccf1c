"""A process of its own that converts and is killed: python killed_conversion.py SOURCE OUTPUT METHOD CALLS...

For each number of CALLS a child converts until it has made so many system calls that change the disk, and
then kills itself with SIGKILL; the next child continues. The last one runs to its end. Prints what each left
behind, one JSON line each.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from kt_kernel.convert.job import Conversion, convert
from kt_kernel.convert.targets import target


class Silent:
    def layer(self, text: str) -> None: ...
    def add(self, input_bytes: int) -> None: ...
    def end(self) -> None: ...


def kill_at_call(calls: int) -> None:
    """Before call number `calls` of those below is made; a write is cut in half by it."""
    counter = itertools.count(1)

    def counted(function: Callable) -> Callable:
        def call(*arguments):
            if next(counter) == calls:
                if function is pwrite:
                    handle, octets, place = arguments
                    pwrite(handle, octets[: len(octets) // 2], place)
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments)

        return call

    pwrite = os.pwrite
    for name in ("pwrite", "fsync", "rename", "unlink"):
        setattr(os, name, counted(getattr(os, name)))


def convert_in_child(conversion: Conversion, calls: int | None) -> int:
    child = os.fork()
    if child == 0:
        if calls is not None:
            kill_at_call(calls)
        convert(conversion, progress=lambda _: Silent())
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> None:
    source, output, method, *calls = sys.argv[1:]
    conversion = Conversion(Path(source), Path(output), target(method, 32), threads=2)
    for number in [*map(int, calls), None]:
        status = convert_in_child(conversion, number)
        left = sorted(path.name for path in Path(output).iterdir()) if Path(output).exists() else []
        print(json.dumps({"calls": number, "status": status, "left": left}), flush=True)


if __name__ == "__main__":
    main()
