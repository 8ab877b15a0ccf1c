"""`kt quant`."""

from __future__ import annotations

from typing import Annotated

import typer

from kt_kernel.cli.commands.base import examples


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(epilog=examples("kt quant /models/Qwen3-30B-A3B -m int8", "kt quant demo -o /tmp/demo-int4"))(
        quant
    )


def quant(
    model: Annotated[str, typer.Argument(help="'demo' or a checkpoint directory; it is only read.")],
    method: Annotated[str, typer.Option("--method", "-m", help="int4 or int8.")] = "int4",
    group_size: Annotated[
        int | None, typer.Option("--group-size", help="Columns that share a scale: 0 (a row), 32, 64, 128.")
    ] = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="Default: beside the model, MODEL-AMXINT4.")
    ] = None,
    input_type: Annotated[
        str | None, typer.Option("--input-type", "-i", help="Checked; the model shows its type.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option("--cpu-threads", min=1, help="Default: one per physical core.")
    ] = None,
    numa_nodes: Annotated[
        int | None, typer.Option("--numa-nodes", help="Without effect: the result serves any number.")
    ] = None,
    no_merge: Annotated[bool, typer.Option("--no-merge", hidden=True)] = False,
    gpu: Annotated[bool, typer.Option("--gpu", hidden=True)] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", hidden=True)] = False,
) -> None:
    """Quantise a model's experts to 4-bit or 8-bit integers for the CPU; rerun to continue."""
    from kt_kernel.cli.quant import QuantSettings, quantise

    quantise(QuantSettings(model, method, group_size, output, input_type, threads))
