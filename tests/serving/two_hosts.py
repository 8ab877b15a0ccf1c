"""Two hosts: this one, and a network namespace with a cable to it. Needs the rights to make one (root)."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Two addresses of a network that nobody has (TEST-NET-2 of RFC 5737 is for documentation), of which each
# process takes four: two runs on one machine do not hear each other.
_NETWORK = 4 * (os.getpid() % 64)
FIRST, SECOND = f"198.51.100.{_NETWORK + 1}", f"198.51.100.{_NETWORK + 2}"
_NAMES = f"127.0.0.1 localhost\n{FIRST} kt-first\n{SECOND} kt-second\n"

# With shared memory of its own, and names for the addresses: asking a name server would take its time.
_APART = 'mount -t tmpfs none /dev/shm && mount --bind "$0" /etc/hosts && exec "$@"'


@dataclass(frozen=True)
class TwoHosts:
    """`first`, `second`: what begins a command that runs there."""

    first: tuple[str, ...]
    second: tuple[str, ...]
    cable: str

    def cut(self) -> None:
        """The cable is pulled: no connection is closed."""
        _ip("link", "set", self.cable, "down")


@contextlib.contextmanager
def two_hosts(folder: Path) -> Iterator[TwoHosts]:
    """Raises OSError where they cannot be made."""
    name, cable = f"kt-host-{os.getpid()}", f"kt{os.getpid()}"
    names = folder / "hosts"
    names.write_text(_NAMES)
    # A short path of their own: servers elsewhere must not take their files for those of dead ones.
    temporary = tempfile.mkdtemp(prefix="kth-")
    apart = ("env", f"TMPDIR={temporary}", "unshare", "-m", "sh", "-c", _APART, str(names))
    try:
        _ip("netns", "add", name)
        _ip("link", "add", cable, "type", "veth", "peer", "name", "kt-cable", "netns", name)
        _ip("addr", "add", f"{FIRST}/30", "dev", cable)
        _ip("link", "set", cable, "up")
        _ip("-n", name, "addr", "add", f"{SECOND}/30", "dev", "kt-cable")
        _ip("-n", name, "link", "set", "kt-cable", "up")
        _ip("-n", name, "link", "set", "lo", "up")
        yield TwoHosts(apart, ("ip", "netns", "exec", name, *apart), cable)
    finally:
        for words in (("link", "del", cable), ("netns", "del", name)):
            with contextlib.suppress(OSError):
                _ip(*words)
        shutil.rmtree(temporary, ignore_errors=True)


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")
