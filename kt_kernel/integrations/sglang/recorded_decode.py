"""Decode steps of a server on a CPU, recorded per batch size and replayed.

How that is done and when it is right: kt_kernel/operators/recorded_step.py.

SGLang's eager runner copies every batch into buffers of its own before it calls the model, so a step of a
given size reads its inputs from the same memory each time; what attention looks up besides is kept in one
place by step_tables.py. The first two steps of a size are recorded, and if they did the same, later ones are
replays.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from kt_kernel.integrations.sglang.step_tables import StepTables
from kt_kernel.operators.recorded_step import RecordedStep, record

logger = logging.getLogger(__name__)

# Each size keeps the tensors of a step: by count, not measured, some 3 MB a token for 48 layers of 2048 and a
# vocabulary of 150,000. The number itself is not tuned.
MOST_TOKENS = 8

_ATTRIBUTE = "_kt_recorded_steps"


@dataclass
class _Steps:
    """By batch size: the first recording, or the one that is replayed."""

    first: dict[int, RecordedStep] = field(default_factory=dict)
    proven: dict[int, RecordedStep] = field(default_factory=dict)
    tables: dict[int, StepTables] = field(default_factory=dict)
    refused: str | None = None  # for good: what cannot be replayed

    def refuse(self, reason: str) -> None:
        logger.info("kt-kernel: decode steps are not replayed: %s", reason)
        self.refused = reason
        self.first.clear()
        self.proven.clear()
        self.tables.clear()


def decode(original: Callable, runner: Any, forward_batch: Any, pp_proxy_tensors: Any = None) -> Any:
    """Around `EagerRunner._execute_decode`."""
    steps = _steps_of(runner)
    if steps.refused is not None or not _is_plain(runner, forward_batch, pp_proxy_tensors):
        return original(runner, forward_batch, pp_proxy_tensors)
    size = forward_batch.batch_size
    tables = steps.tables.setdefault(size, StepTables())
    proven = steps.proven.get(size)
    if proven is not None:
        batch = runner.load_batch(forward_batch, pp_proxy_tensors)
        if tables:
            tables.plan(runner.model_runner.attn_backend, batch)
        return copy.copy(proven.replay())
    output, recorded = _recorded(runner, forward_batch, tables)
    if isinstance(recorded, str):
        steps.refuse(recorded)
    else:
        _compare(steps, size, recorded)
    return output


def _recorded(runner: Any, forward_batch: Any, tables: StepTables) -> tuple[Any, RecordedStep | str]:
    """What stock `_execute_decode` does, its call of the model recorded."""
    from sglang.srt.model_executor.forward_context import forward_context, get_forward_context

    model_runner = runner.model_runner
    batch = runner.load_batch(forward_batch)
    if batch.needs_forward_metadata_init():
        tables.plan(model_runner.attn_backend, batch)
    with forward_context(get_forward_context(), forward_batch=batch):
        return record(lambda: model_runner.model.forward(batch.input_ids, batch.positions, batch))


def _compare(steps: _Steps, size: int, recorded: RecordedStep) -> None:
    first = steps.first.pop(size, None)
    if first is None:
        steps.first[size] = recorded
    elif first.signature == recorded.signature:
        steps.proven[size] = recorded
        logger.debug(
            "kt-kernel: decode steps of %d tokens are replayed, %d calls of them through Python",
            size,
            recorded.calls_from_python,
        )
    else:
        differing = next(
            (pair for pair in zip(first.signature, recorded.signature, strict=False) if pair[0] != pair[1]),
            None,
        )
        steps.refuse(f"two of them differ at {differing[1] if differing else 'their length'}")


def _steps_of(runner: Any) -> _Steps:
    steps = getattr(runner, _ATTRIBUTE, None)
    if steps is None:
        steps = _Steps()
        setattr(runner, _ATTRIBUTE, steps)
    return steps


def _is_plain(runner: Any, batch: Any, pp_proxy_tensors: Any) -> bool:
    """Whether nothing but the memory of its inputs distinguishes this step from others of its size."""
    from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode
    from sglang.srt.runtime_context import get_parallel

    return (
        batch.batch_size <= MOST_TOKENS
        and len(batch.input_ids) == batch.batch_size
        and pp_proxy_tensors is None
        and get_parallel().tp_size == 1
        and not runner.enable_pdmux
        and not hasattr(runner.model_runner.model, "prepare_forward_batch")
        and batch.spec_info is None
        and batch.input_embeds is None
        and batch.replace_embeds is None
        and batch.mamba_track_mask is None
        and not any(batch.lora_ids or ())
        and batch.capture_hidden_mode in (None, CaptureHiddenMode.NULL)
    )
