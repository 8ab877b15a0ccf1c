"""The typer application behind the `kt` command.

Only typer is imported here: `kt --help` must not pay for torch.
"""

from __future__ import annotations

import logging
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from kt_kernel.errors import KTError


class SentenceGroup(TyperGroup):
    """Shows a `KTError` as one sentence on standard error, with exit status 1."""

    def invoke(self, ctx: Any) -> Any:
        """Run the chosen command."""
        try:
            return super().invoke(ctx)
        except KTError as error:
            typer.echo(f"kt: {error}", err=True)
            raise typer.Exit(1) from error


app = typer.Typer(
    name="kt",
    cls=SentenceGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def kt() -> None:
    """Serve mixture-of-experts models whose experts run on the CPU."""
    # Our own progress only: HTTP clients and torch log too much at this level.
    logging.basicConfig(level=logging.WARNING, format="kt: %(message)s", stream=sys.stderr)
    logging.getLogger("kt_kernel").setLevel(logging.INFO)


@app.command(
    context_settings={"ignore_unknown_options": True},
    epilog="All other options go to the server: see python -m sglang.launch_server --help.",
)
def run(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL [SERVER OPTIONS]",
            help="'demo', a checkpoint directory or a .gguf file, then options.",
        ),
    ],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the server command and stop.")] = False,
) -> None:
    """Start an OpenAI-compatible server: kt run demo --port 31000."""
    from kt_kernel.cli.run import dry_run_text, serve

    model, *server_options = arguments
    if model.startswith("-"):
        raise typer.BadParameter(f"the model comes first: kt run demo {model} ...", param_hint="MODEL")
    if dry_run:
        typer.echo(dry_run_text(model, server_options))
    else:
        raise typer.Exit(serve(model, server_options))


@app.command()
def chat(
    host: Annotated[str, typer.Option("--host", "-H", help="Where the server listens.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", "-p", help="The server's port.")] = 30000,
    model: Annotated[
        str, typer.Option("--model", "-m", help="Model name; default: the one being served.")
    ] = "",
    system: Annotated[str, typer.Option("--system", "-s", help="System message.")] = "",
    temperature: Annotated[
        float | None, typer.Option("--temperature", "-t", min=0.0, help="Default: the model's own.")
    ] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Length limit of an answer.")] = 2048,
) -> None:
    """Talk to a running server; /clear forgets the conversation, /quit ends it."""
    from kt_kernel.cli.chat import ChatSettings, converse

    converse(ChatSettings(host, port, model, system, temperature, max_tokens))


@app.command()
def top(
    host: Annotated[str, typer.Option("--host", "-H", help="Where the server listens.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", "-p", help="The server's port.")] = 30000,
    interval: Annotated[
        float, typer.Option("--interval", "-i", min=0.1, help="Seconds between two readings.")
    ] = 1.0,
    readings: Annotated[
        int | None, typer.Option("--readings", "-n", min=1, help="Stop after so many; default: at Ctrl-C.")
    ] = None,
) -> None:
    """Watch where a running server's experts live: hit rates, moved experts, bytes, CPU speed."""
    from kt_kernel.cli.top import TopSettings, watch

    watch(TopSettings(host, port, interval, readings))


@app.command()
def doctor(
    device: Annotated[
        bool, typer.Option("--device", help="Try every path between CPU and CUDA device instead.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Details, and why each kernel was chosen or not.")
    ] = False,
) -> None:
    """Check this installation, down to one real expert layer; exit status 1 if something is broken."""
    if device:
        from kt_kernel.cli.device_doctor import examine_device

        raise typer.Exit(examine_device())
    from kt_kernel.cli.doctor import Detail, examine

    raise typer.Exit(examine(Detail.FULL if verbose else Detail.BRIEF))


@app.command()
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


@app.command()
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


@app.command()
def version() -> None:
    """Print the versions that matter in a bug report."""
    from kt_kernel.cli.version import version_lines

    typer.echo("\n".join(version_lines()))
