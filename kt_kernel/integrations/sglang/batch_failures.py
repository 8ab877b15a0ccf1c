"""An exception while a batch is computed ends the requests of that batch, where SGLang's loop can go on
without its results: on a CPU, with one rank, without drafts. Elsewhere it ends the server, as in stock
SGLang 0.5.23.

On several ranks the others would wait in the middle of the batch; a device's error may be there to stay; a
step with drafts has more results than one token a request.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

logger = logging.getLogger(__name__)

_failure: list[str] = []  # at most one: of the batch that runs


def compute(original: Callable, worker: Any, batch: Any, *arguments: Any, **options: Any) -> Any:
    """Around `TpModelWorker.forward_batch_generation`: a result that nobody will read, in place of an
    exception.
    """
    try:
        return original(worker, batch, *arguments, **options)
    except Exception as error:
        if not _can_go_on(worker, batch):
            raise
        logger.exception("a batch of %d requests failed, and they with it", len(batch.reqs))
        _failure[:] = [f"the server could not compute this request: {type(error).__name__}: {error}"]
        return _nothing(batch)


def take() -> str | None:
    """Why the batch that ran since the last call failed; None if it did not."""
    return _failure.pop() if _failure else None


def _can_go_on(worker: Any, batch: Any) -> bool:
    from sglang.srt.runtime_context import get_parallel

    parallel = get_parallel()
    return (
        batch is not None
        and worker.model_runner.device == "cpu"
        and parallel.tp_size == parallel.pp_size == 1
        and batch.spec_algorithm.is_none()
        and not worker.is_dllm()
    )


def _nothing(batch: Any) -> Any:
    """One token for each request, and no probabilities, which they do not ask for any more."""
    from sglang.srt.layers.logits_processor import LogitsProcessorOutput
    from sglang.srt.managers.utils import GenerationBatchResult

    count = len(batch.reqs)
    for request in batch.reqs:
        request.return_logprob = False
    return GenerationBatchResult(
        logits_output=LogitsProcessorOutput(next_token_logits=None, next_token_logprobs=torch.zeros(count)),
        next_token_ids=torch.zeros(count, dtype=torch.int64),
    )
