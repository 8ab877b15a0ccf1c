"""`kt model`: list, download, verify, info, add, remove, scan."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kt_kernel.cli.commands.base import examples, group

app = group("model", no_args_is_help=True)

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A name of kt model list, or a path.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


def register(kt: typer.Typer) -> None:
    """Add the commands."""
    kt.add_typer(app)


@app.callback()
def model() -> None:
    """List, download, check and remove the models of this machine."""


@app.command("list", epilog=examples("kt model list"))
def list_models() -> None:
    """The models that kt run knows by name: your list, your folders, Hugging Face's cache."""
    from kt_kernel.cli.models.listing import lines

    typer.echo("\n".join(lines()))


@app.command(
    epilog=examples(
        "kt model download Qwen/Qwen3-30B-A3B",
        "kt model download unsloth/Qwen3-30B-A3B-GGUF --include '*Q4_K_M*'",
        "kt model download Qwen/Qwen3-30B-A3B --to /models/qwen3 --revision main",
        also="What was begun is continued. HF_ENDPOINT names another hub, HF_TOKEN your key.",
    )
)
def download(
    repository: Annotated[str, typer.Argument(metavar="ORGANISATION/NAME", help="On the Hugging Face hub.")],
    revision: Annotated[str, typer.Option("--revision", "-r", help="Branch, tag or commit.")] = "main",
    include: Annotated[
        list[str] | None, typer.Option("--include", help="Only files like this; several times.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option("--exclude", help="No files like this; several times.")
    ] = None,
    to: Annotated[
        str, typer.Option("--to", help="Directory of the model; default: see kt config, download-folder.")
    ] = "",
    yes: Yes = False,
) -> None:
    """Download a model from the Hugging Face hub, after showing its size and the free space."""
    from kt_kernel.cli.models.downloading import download as run
    from kt_kernel.cli.models.downloading import wanted
    from kt_kernel.cli.models.removing import confirmation

    run(wanted(repository, revision, include or (), exclude or (), to), confirmation(yes))


@app.command(epilog=examples("kt model verify Qwen/Qwen3-30B-A3B", "kt model verify /models/qwen3 --quick"))
def verify(
    model: Model,
    quick: Annotated[bool, typer.Option("--quick", help="Names and headers only: reads no weights.")] = False,
) -> None:
    """Check that a model is complete and unchanged; exit status 1 if it is not.

    The first time checksums of files that the hub did not give are recorded, later they are compared.
    """
    from kt_kernel.cli.models.checking import Depth
    from kt_kernel.cli.models.checking import verify as run

    raise typer.Exit(run(model, Depth.HEADERS if quick else Depth.ALL))


@app.command(epilog=examples("kt model info demo", "kt model info /models/Qwen3-30B-A3B --json"))
def info(
    model: Model,
    json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Family, format, sizes and the CPU's kernels, from configuration and headers."""
    from kt_kernel.cli.models.info import describe, json_text, text

    found = describe(model)
    typer.echo(json_text(found) if json else text(found))


@app.command(
    epilog=examples(
        "kt model add my-qwen /models/Qwen3-30B-A3B", "kt model add q4 ~/models/model-Q4_K_M.gguf"
    )
)
def add(
    name: Annotated[str, typer.Argument(help="For kt run.")],
    path: Annotated[str, typer.Argument(help="A checkpoint's directory or a .gguf file; it stays there.")],
) -> None:
    """Give a model on this machine a name."""
    from kt_kernel.cli.models.listing import add_model

    add_model(name, Path(path).expanduser().absolute())


@app.command(epilog=examples("kt model remove Qwen/Qwen3-30B-A3B", "kt model remove my-qwen --yes"))
def remove(model: Model, yes: Yes = False) -> None:
    """Delete a model that kt downloaded; of one added by name, only forget the name."""
    from kt_kernel.cli.models.removing import confirmation
    from kt_kernel.cli.models.removing import remove as run

    run(model, confirmation(yes))


@app.command(epilog=examples("kt model scan /models", "kt model scan ~/models --add"))
def scan(
    folder: Annotated[str, typer.Argument(help="Searched with all folders below it.")],
    add: Annotated[bool, typer.Option("--add", help="Give each that has no name its own.")] = False,
) -> None:
    """Find checkpoints and .gguf files in a folder."""
    from kt_kernel.cli.models.listing import add_found, scan_lines

    found = Path(folder).expanduser().absolute()
    typer.echo("\n".join(scan_lines(found)))
    if add:
        add_found(found)
