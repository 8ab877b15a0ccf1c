"""From the file of a run to an adapter, and from an adapter to a checkpoint."""

from __future__ import annotations

import logging
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from kt_kernel.cli.errors import CommandError
from kt_kernel.cli.machine import native_extension
from kt_kernel.cli.model import DEMO, demo_model
from kt_kernel.cli.sft.settings import Run, read_run

logger = logging.getLogger(__name__)

_LAST_SAVED = "last"


class Beginning(Enum):
    """Where a run begins."""

    START = "the start"
    LAST_SAVED = "the step that was saved last"


def train_run(path: str, beginning: Beginning) -> None:
    """Train as the file says; writes `adapter/`, `loss.csv` and `loss.png` into the output folder.

    Raises a KTError for what does not fit together, before the model is loaded where that can be seen.
    """
    run = read_run(path)
    output = Path(run.output)
    _check_output(output, beginning)
    if not Path(run.data).is_file():
        raise CommandError(f"data '{run.data}' is no file.")
    model, tokenizer = load_run(run)
    import torch

    from kt_kernel.cli.sft.data import read_examples
    from kt_kernel.cli.sft.loop import Loop
    from kt_kernel.cli.sft.plot import write_losses

    examples = read_examples(run.data, tokenizer, run.train.max_length)
    torch.manual_seed(run.train.seed)
    last = output / _LAST_SAVED
    model = _with_adapter(model, run, last if beginning is Beginning.LAST_SAVED else None)
    loop = Loop(model, examples, run.train, tokenizer.pad_token_id or 0, run.device)
    if beginning is Beginning.LAST_SAVED:
        loop.resume(last)
    output.mkdir(parents=True, exist_ok=True)
    with _board(output) as board, _shown(loop.total, len(loop.losses)) as show:
        for step in loop.steps(lambda loop: loop.save(last)):
            show(step)
            board(step)
    model.save_pretrained(run.adapter)
    write_losses(loop.losses, output)
    typer.echo(f"adapter: {run.adapter}")


def export_run(path: str, to: str) -> None:
    """Write the model of the run with its adapter merged in."""
    run = read_run(path)
    check_adapter(run)
    if Path(to).exists() and any(Path(to).iterdir()):
        raise CommandError(f"'{to}' is not empty; give a new folder.")
    base, tokenizer = load_run(run)
    from kt_kernel.training import load_adapter, merge

    folder = merge(load_adapter(base, run.adapter), to)
    tokenizer.save_pretrained(folder)
    typer.echo(f"checkpoint: {folder}")


def check_adapter(run: Run) -> None:
    """Raises CommandError if the run has made none."""
    if not run.adapter.is_dir():
        raise CommandError(f"there is no adapter in '{run.adapter}': train it with kt sft train.")


def load_run(run: Run) -> tuple[Any, Any]:
    """(model, tokenizer)"""
    native_extension()
    try:
        import peft
        import torch
        import transformers
    except ImportError as error:
        raise CommandError(
            f"Training needs the Python package {error.name}, which is not installed: "
            "pip install 'peft>=0.21.2,<0.22' 'transformers>=5' matplotlib gets it."
        ) from error
    from kt_kernel.training import load

    logger.debug("peft %s", peft.__version__)
    if run.dtype not in ("bfloat16", "float16", "float32"):
        raise CommandError(f"dtype is {run.dtype!r}, expected bfloat16, float16 or float32.")
    if run.device.startswith("cuda") and not torch.cuda.is_available():
        raise CommandError(f"device is {run.device!r}, but torch finds no CUDA device here.")
    dtype = getattr(torch, run.dtype)
    name = str(demo_model().path) if run.model == DEMO else run.model
    options = {"experts": run.experts, "dtype": dtype, "device": run.device, "threads": run.threads}
    model = load(transformers.AutoModelForCausalLM, name, **options)
    return model, transformers.AutoTokenizer.from_pretrained(model.name_or_path)


def _with_adapter(model: Any, run: Run, saved: Path | None) -> Any:
    from peft import LoraConfig, get_peft_model

    from kt_kernel.training import load_adapter, lora_config

    if run.train.gradient_checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if saved is not None:
        return load_adapter(model, saved, mode="training")
    said = run.lora
    config = LoraConfig(
        r=said.r,
        lora_alpha=said.alpha,
        lora_dropout=said.dropout,
        target_modules=list(said.target_modules),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, lora_config(config, experts=said.experts))


def _check_output(output: Path, beginning: Beginning) -> None:
    last = output / _LAST_SAVED
    if beginning is Beginning.LAST_SAVED:
        before = last.with_name(f"{last.name}.before")
        if not last.exists() and before.exists():  # a run ended while it put the new one in its place
            before.rename(last)
        if not last.exists():
            raise CommandError(f"there is no saved step in '{last}'; leave --resume out.")
        return
    if (output / "adapter").exists():
        raise CommandError(
            f"'{output}' holds the adapter of another run: give another output, or remove that folder."
        )
    if last.exists():
        raise CommandError(
            f"'{last}' holds the saved steps of a run that did not end: add --resume, or remove that folder."
        )


@contextmanager
def _shown(total: int, done: int) -> Iterator[Any]:
    """A bar with loss, speed and memory; without a terminal, a line every tenth of the run."""
    console = Console(stderr=True)
    columns = (
        TextColumn("step {task.completed}/{task.total}"),
        BarColumn(),
        TextColumn("{task.fields[told]}"),
    )
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task("", total=total, completed=done, told="")

        def show(step: Any) -> None:
            told = (
                f"loss {step.loss:.4f}  {step.tokens / step.seconds:.0f} tokens/s  "
                f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB"
            )
            bar.update(task, completed=step.number, told=told)
            if not console.is_terminal and step.number % max(1, total // 10) == 0:
                typer.echo(f"step {step.number} of {total}: {told}", err=True)

        yield show


@contextmanager
def _board(output: Path) -> Iterator[Any]:
    """TensorBoard's files, where it is installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        yield lambda step: None
        return
    with SummaryWriter(str(output / "tensorboard")) as writer:

        def board(step: Any) -> None:
            writer.add_scalar("loss", step.loss, step.number)
            writer.add_scalar("learning_rate", step.rate, step.number)
            writer.add_scalar("tokens_per_second", step.tokens / step.seconds, step.number)

        yield board
