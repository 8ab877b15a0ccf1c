"""What computes: the kernels chosen for this CPU, the demo model, and one real layer per method."""

from __future__ import annotations

from collections import Counter

from kt_kernel.cli.checks.finding import Finding, Status
from kt_kernel.cli.machine import native_extension, this_machine


def kernels() -> Finding:
    """Every method has a kernel for this CPU; which one is in the table of `kt doctor -v`."""
    rows = native_extension().dispatch_table()
    chosen: dict[str, str] = {}
    for row in rows:
        if row["state"] == "chosen":
            chosen.setdefault(row["method"], row["activations"])
    without = [method for method in dict.fromkeys(row["method"] for row in rows) if method not in chosen]
    if without:
        return Finding(Status.WARN, f"no kernel for {', '.join(without)}", "use a model of another method")
    kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(chosen.values()).items())
    return Finding(Status.OK, f"of {len(chosen)} methods, by activations: {kinds} (-v: all)")


def demo_source() -> Finding:
    """The package with the demo's weights."""
    from kt_kernel.demo import DemoError, demo_checkpoint_path
    from kt_kernel.demo.gguf_source import find_source

    try:
        source = find_source()
    except DemoError as error:
        return Finding(Status.WARN, "kt run demo cannot work", str(error))
    target = demo_checkpoint_path(source)
    return Finding(Status.OK, f"{target} ({'built' if target.exists() else 'built on first use'})")


def expert_layer() -> Finding:
    """A real layer of each method and kind of activations, loaded and run, against exact arithmetic."""
    from kt_kernel.cli.forward_check import TOLERANCE_NMSE, check_layers

    results = check_layers(this_machine().threads)
    wrong = [result for result in results if not result.accepted]
    if wrong:
        seen = ", ".join(
            f"{result.method} with {result.activations} activations, {result.tokens} tokens: error "
            f"{result.nmse:.1e}"
            for result in wrong
        )
        promises = ", ".join(f"{limit:.0e} ({kind})" for kind, limit in TOLERANCE_NMSE.items())
        advice = f"the promise is {promises}: report this with the output of kt doctor -v and kt version"
        return Finding(Status.FAIL, seen, advice)
    errors = {
        kind: max((result.nmse for result in results if result.activations == kind), default=None)
        for kind in TOLERANCE_NMSE
    }
    methods = dict.fromkeys(result.method for result in results)
    largest = ", ".join(f"{error:.1e} ({kind})" for kind, error in errors.items() if error is not None)
    return Finding(Status.OK, f"{len(methods)} methods, largest errors {largest}", detail=", ".join(methods))
