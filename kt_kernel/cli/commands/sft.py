"""`kt sft`: fine-tuning from a YAML file."""

from __future__ import annotations

from typing import Annotated

import typer

from kt_kernel.cli.commands.base import examples, group

Settings = Annotated[str, typer.Argument(help="The YAML file of the run (doc/training.md).")]


def register(app: typer.Typer) -> None:
    """Add the group of commands."""
    sft = group(help="Fine-tune a model's attention and experts with LoRA; its experts stay on the CPU.")
    sft.command(epilog=examples("kt sft train run.yaml", "kt sft train run.yaml --resume"))(train)
    sft.command(epilog=examples("kt sft chat run.yaml"))(chat)
    sft.command(epilog=examples("kt sft export run.yaml --to /models/mine"))(export)
    app.add_typer(sft, name="sft")


def train(
    settings: Settings,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the last saved step.")] = False,
) -> None:
    """Train, showing loss and speed, and save the adapter and a plot of the loss."""
    from kt_kernel.cli.sft.run import Beginning, train_run

    train_run(settings, Beginning.LAST_SAVED if resume else Beginning.START)


def chat(
    settings: Settings,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="The longest answer.")] = 256,
) -> None:
    """Talk to the trained model, in this process and without a server."""
    from kt_kernel.cli.sft.talk import talk

    talk(settings, max_tokens)


def export(
    settings: Settings,
    to: Annotated[str, typer.Option("--to", help="A new directory.")],
) -> None:
    """Write a whole checkpoint in bfloat16 with the adapter in its weights."""
    from kt_kernel.cli.sft.run import export_run

    export_run(settings, to)
