"""`kt bench` and `kt bench serve`."""

from __future__ import annotations

from typing import Annotated

import typer

from kt_kernel.cli.commands.base import ApiKey, Host, Port, examples, group

app = group(
    "bench",
    invoke_without_command=True,
    epilog=examples(
        "kt bench",
        "kt bench --method FP8 --method MXFP4 --tokens 1,64",
        "kt bench serve -h",
    ),
)


def register(kt: typer.Typer) -> None:
    """Add the commands."""
    kt.add_typer(app)


@app.callback()
def kernels(
    context: typer.Context,
    method: Annotated[
        list[str] | None, typer.Option("--method", help="May be given several times; default: all.")
    ] = None,
    shape: Annotated[str, typer.Option("--shape", help="S: Qwen3-30B-A3B, L: DeepSeek-V3.")] = "S",
    tokens: Annotated[str, typer.Option("--tokens", help="Tokens of a call.")] = "1,16,1024",
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="Default: one per physical core.")
    ] = None,
    seconds: Annotated[
        int | None,
        typer.Option("--seconds", min=1, help="Begin nothing that ends later; default: 120 for all methods."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON line per measurement.")] = False,
) -> None:
    """Measure every method's speed as a share of this machine's limits, in about two minutes.

    kt bench serve measures a running server.
    """
    if context.invoked_subcommand is not None:
        return
    from kt_kernel.cli.bench import plan, print_json, print_table

    chosen = plan(method or (), shape, tokens, threads, seconds)
    raise typer.Exit(print_json(chosen) if json else print_table(chosen))


@app.command(
    epilog=examples(
        "kt bench serve",
        "kt bench serve -p 31000 --users 1,2,4,8 --prompt-tokens 128,2048",
        "kt bench serve --json --png speed.png > speed.jsonl",
        also="Tokens are those the server counts. Prompts are random words, so nothing of them is cached.",
    )
)
def serve(
    host: Host = "127.0.0.1",
    port: Port = 30000,
    users: Annotated[
        str, typer.Option("--users", "--concurrency", "-u", help="At the same time; several numbers.")
    ] = "1,4,8",
    prompt_tokens: Annotated[str, typer.Option("--prompt-tokens", help="Lengths of prompts.")] = "256",
    output_tokens: Annotated[str, typer.Option("--output-tokens", help="Lengths of answers.")] = "64",
    requests: Annotated[
        int | None,
        typer.Option("--requests", "-n", min=1, help="Of each line; default: two a user, at least 4."),
    ] = None,
    model: Annotated[
        str, typer.Option("--model", "-m", help="Model name; default: the one being served.")
    ] = "",
    json: Annotated[bool, typer.Option("--json", help="One JSON line for each line of the table.")] = False,
    png: Annotated[
        str, typer.Option("--png", help="Also draw charts into this file: .png, .svg or .pdf.")
    ] = "",
    api_key: ApiKey = "",
) -> None:
    """Measure a running server: time to the first token, time per token, throughput."""
    from pathlib import Path

    from kt_kernel.bench.serving.report import head_lines, json_line, table_line
    from kt_kernel.cli.bench_serve import ServeBench, levels, measure_server
    from kt_kernel.cli.server_url import base_url

    def head(name: str) -> None:
        if not json:
            typer.echo("\n".join([f"{name} at {bench.base_url}", *head_lines()]))

    bench = ServeBench(
        base_url(host, port),
        model,
        api_key,
        levels(users, prompt_tokens, output_tokens),
        requests,
        Path(png).expanduser() if png else None,
    )
    status = measure_server(
        bench, lambda f, name: typer.echo(json_line(f, name) if json else table_line(f)), head
    )
    raise typer.Exit(status)
