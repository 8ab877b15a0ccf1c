"""Risk: a server that ends says the wrong thing about why."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import os
from types import SimpleNamespace
from kt_kernel.integrations.sglang import deaths
for code in (3, -9, -7, -11, -64):
    print(deaths.meaning(code))
os.statvfs = lambda path: SimpleNamespace(f_bavail=0, f_frsize=4096)
print(deaths.meaning(-7))
print(deaths.tell_at_start(RuntimeError(), 0, SimpleNamespace(exitcode=-7)))
"""


def test_each_ending_has_its_reason():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    own, killed, bad_page, crashed, unknown, full, at_start = done.stdout.splitlines()
    assert own.startswith("exit code 3; its own lines")
    assert "SIGKILL" in killed and "memory ran out" in killed
    assert "SIGBUS" in bad_page and "memory ran out" not in bad_page
    assert "SIGSEGV: it crashed" in crashed
    assert "signal" in unknown.lower()
    assert "/dev/shm is full" in full and "--shm-size" in full
    assert "scheduler of rank 0 ended while it started" in at_start and "/dev/shm is full" in at_start
