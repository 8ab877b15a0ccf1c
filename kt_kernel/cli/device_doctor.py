"""`kt doctor --device`: a table of all paths between CPU and device, to be sent with a report."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from rich.console import Console
from rich.table import Table

from kt_kernel.cli.checks.finding import Finding, Status, run_check
from kt_kernel.cli.device_checks import paths
from kt_kernel.cli.machine import this_machine
from kt_kernel.cli.version import version_lines

_COLUMNS = 80

Check = Callable[[], Finding]


def examine_device(device: torch.device | None = None) -> int:
    """Run all checks on `device`, or the present CUDA device; returns the exit status: 1 if any failed, 2 if
    there is no device.
    """
    console = Console(width=_COLUMNS)
    if device is None and not torch.cuda.is_available():
        console.out("There is no CUDA device here, or torch was built without CUDA: nothing was checked.")
        return 2
    device = torch.device("cuda", 0) if device is None else device
    _print_machine(console, device)
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("path", "state", "seen"):
        table.add_column(column, overflow="fold")
    failed = False
    for name, check in checks(device):
        finding = run_check(check)
        failed |= finding.status is Status.FAIL
        table.add_row(name, finding.status.value, finding.seen)
    console.print(table, markup=False, highlight=False)
    console.out("Please send this with your report." if failed else "All paths of this device work.")
    return int(failed)


def checks(device: torch.device) -> Iterator[tuple[str, Check]]:
    """Name and check of every path: the engine's, then one per format of slots."""
    for path in paths(this_machine().threads):
        yield path.name, lambda check=path.check: check(device)
    from kt_kernel.integrations.sglang.format_checks import FORMAT_CHECKS

    for form in FORMAT_CHECKS:
        yield f"slots {form.method}", lambda form=form: _format_finding(form, device)


def _format_finding(form: object, device: torch.device) -> Finding:
    """A format that cannot be used is decoded by servers: a warning, not a failure."""
    if device.type != "cuda":
        return Finding(Status.WARN, "needs a CUDA device")
    verdict = form.run(device)
    if verdict.is_right:
        return Finding(Status.OK, f"native; error {verdict.error:.0e}")
    return Finding(Status.WARN, f"decoded: {verdict.reason or 'not known on this device'}")


def _print_machine(console: Console, device: torch.device) -> None:
    for line in version_lines():
        console.out(line, highlight=False)
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        console.out(
            f"{torch.cuda.get_device_name(device)}, compute capability {major}.{minor}", highlight=False
        )
    else:
        console.out(f"{device.type} in the place of a GPU", highlight=False)
