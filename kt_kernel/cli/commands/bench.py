"""`kt bench`."""

from __future__ import annotations

from typing import Annotated

import typer

from kt_kernel.cli.commands.base import examples


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(epilog=examples("kt bench", "kt bench --method FP8 --method MXFP4 --tokens 1,64"))(bench)


def bench(
    method: Annotated[
        list[str] | None, typer.Option("--method", help="May be given several times; default: all.")
    ] = None,
    shape: Annotated[str, typer.Option("--shape", help="S: Qwen3-30B-A3B, L: DeepSeek-V3.")] = "S",
    tokens: Annotated[str, typer.Option("--tokens", help="Tokens of a call.")] = "1,16,1024",
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="Default: one per physical core.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON line per measurement.")] = False,
) -> None:
    """Measure every method's speed as a share of this machine's limits; takes about a minute."""
    from kt_kernel.cli.bench import plan, print_json, print_table

    chosen = plan(method or (), shape, tokens, threads)
    if json:
        print_json(chosen)
    else:
        print_table(chosen)
