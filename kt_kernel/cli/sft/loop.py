"""The steps of a run, and what is saved between them."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kt_kernel.cli.sft.data import IGNORED, Example, as_tensors, batches
from kt_kernel.cli.sft.schedule import Schedule
from kt_kernel.cli.sft.settings import TrainSettings
from kt_kernel.errors import CheckpointPathError, ConfigurationError

_STATE = "state.pt"


@dataclass(frozen=True)
class Step:
    """What a step was like: `loss` is the mean over the tokens that were learned."""

    number: int
    loss: float
    rate: float
    tokens: int
    seconds: float


class Loop:
    """Trains `model`, on `device`, with the examples; call `steps` once."""

    def __init__(
        self, model: Any, examples: Sequence[Example], settings: TrainSettings, padding: int, device: str
    ) -> None:
        self._model, self._settings = model, settings
        self._examples = len(examples)
        self._padding, self._device = padding, device
        per_step = settings.batch_size * settings.accumulate
        self.total = settings.steps or max(1, round(settings.epochs * len(examples) / per_step))
        self._schedule = Schedule(settings.learning_rate, self.total, settings.warmup)
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(
            self._parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        self._batches = batches(examples, per_step, settings.seed)
        self.losses: list[float] = []

    def steps(self, saved: Callable[[Loop], None]) -> Iterator[Step]:
        """Each step after it was made. `saved` is called every `save_every` steps, and after the last."""
        self._model.train()
        while len(self.losses) < self.total:
            step = self._step(next(self._batches))
            every = self._settings.save_every
            if step.number == self.total or (every and step.number % every == 0):
                saved(self)
            yield step

    def save(self, folder: Path) -> None:
        """The adapter, and what `resume` needs to go on as if nothing had happened.

        Written beside `folder`, which is replaced when all is there.
        """
        partial, before = (folder.with_name(f"{folder.name}.{what}") for what in ("partial", "before"))
        shutil.rmtree(partial, ignore_errors=True)
        self._model.save_pretrained(partial)
        state = {
            "losses": self.losses,
            "settings": dataclasses.asdict(self._settings),
            "examples": self._examples,
            "optimizer": self._optimizer.state_dict(),
            "generator": torch.get_rng_state(),
        }
        torch.save(state, partial / _STATE)
        shutil.rmtree(before, ignore_errors=True)
        if folder.exists():
            folder.rename(before)
        partial.rename(folder)
        shutil.rmtree(before, ignore_errors=True)

    def resume(self, folder: Path) -> None:
        """Continue after the step that `folder` was saved at; the model has its adapter already.

        Raises CheckpointPathError if nothing was saved there, ConfigurationError for a run that was another.
        """
        try:
            state = torch.load(folder / _STATE, weights_only=True)
        except OSError as error:
            raise CheckpointPathError(f"there is no saved step in '{folder}'; leave --resume out.") from error
        self._check_same("examples", state["examples"], self._examples)
        for name, value in dataclasses.asdict(self._settings).items():
            if name != "save_every":
                self._check_same(name, state["settings"][name], value)
        self._optimizer.load_state_dict(state["optimizer"])
        self.losses = state["losses"]
        for _ in self.losses:
            next(self._batches)
        torch.set_rng_state(state["generator"])

    @staticmethod
    def _check_same(name: str, saved: Any, now: Any) -> None:
        if saved != now:
            raise ConfigurationError(
                f"--resume needs the run that was saved: its {name} was {saved!r}, and is {now!r} now."
            )

    def _step(self, examples: list[Example]) -> Step:
        begin = time.perf_counter()
        number = len(self.losses)
        rate = self._schedule.rate(number)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        size = self._settings.batch_size
        parts = [
            as_tensors(examples[place : place + size], self._padding, self._device)
            for place in range(0, len(examples), size)
        ]
        # Every learned token of a step counts alike, whichever part it is in.
        learned = sum(int((part["labels"][:, 1:] != IGNORED).sum()) for part in parts)
        total = 0.0
        for part in parts:
            loss = self._model(**part, num_items_in_batch=learned).loss
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self._parameters, self._settings.max_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.losses.append(total)
        tokens = sum(int(part["attention_mask"].sum()) for part in parts)
        return Step(number + 1, total, rate, tokens, time.perf_counter() - begin)
