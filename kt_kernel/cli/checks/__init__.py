"""The checks behind `kt doctor`: each looks at one thing and says what it saw.

A check never raises: whatever goes wrong is its finding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from kt_kernel.cli.checks import layers, machine, packages, server
from kt_kernel.cli.checks.finding import Finding, Status, run_check


@dataclass(frozen=True)
class Check:
    """`look` says how it is; without those that it `needs` it could only repeat their failure."""

    name: str
    look: Callable[[], Finding]
    needs: tuple[str, ...] = ()


CHECKS = (
    Check("python", packages.python_version),
    Check("package", packages.package),
    Check("extension", packages.extension),
    Check("cpu", machine.cpu_features, ("extension",)),
    Check("topology", machine.topology, ("extension",)),
    Check("torch", packages.torch_build),
    Check("sglang", packages.sglang_package),
    Check("plug-in", packages.plugin_registered),
    Check("hooks", server.hooks, ("extension", "torch", "sglang", "plug-in")),
    Check("memory", machine.memory),
    Check("disk", machine.disk),
    Check("port", machine.port),
    Check("demo model", layers.demo_source),
    Check("kernels", layers.kernels, ("cpu",)),
    Check("expert layer", layers.expert_layer, ("cpu", "topology", "torch")),
)


def run_checks(checks: tuple[Check, ...] = CHECKS) -> Iterator[tuple[str, Finding]]:
    """Name and finding of each, as soon as it is known."""
    failed: set[str] = set()
    for check in checks:
        missing = [name for name in check.needs if name in failed]
        if missing:
            finding = Finding(Status.SKIP, f"not tried: needs {', '.join(missing)}")
        else:
            finding = run_check(check.look)
        if finding.status in (Status.FAIL, Status.SKIP):
            failed.add(check.name)
        yield check.name, finding
