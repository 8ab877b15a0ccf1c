"""Where SGLang's scheduler meets the hybrid model: before each step, after it, and when it is asked how
things are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from kt_kernel.errors import KTError
from kt_kernel.hybrid.recording import DistributionRecorder
from kt_kernel.integrations.sglang.served_model import ServedModel, served_models

logger = logging.getLogger(__name__)

REPORT_KEY = "kt"


def begin_step(runner: Any, *arguments: Any, **options: Any) -> None:
    """Before `ModelRunner.forward`: the one moment in a step at which experts may change their places.

    A draft model's experts are none of ours.
    """
    if not runner.is_draft_worker:
        for served in served_models():
            served.begin_step()


def run_batch(original: Callable, scheduler: Any, batch: Any, *arguments: Any, **options: Any) -> Any:
    """Around `Scheduler.run_batch`: a failed batch is marked before the scheduler goes on.

    On a GPU the results come later, so only a chunk of a prompt is waited for: before the next one the
    scheduler puts its keys and values into the prefix cache, where other requests would find them.
    """
    result = original(scheduler, batch, *arguments, **options)
    for served in served_models():
        if not served.is_asynchronous or _is_chunk(scheduler, batch):
            _end_if_failed(served, scheduler, batch, result)
    return result


def process_batch_result(scheduler: Any, batch: Any, result: Any) -> None:
    """Before `Scheduler.process_batch_result`: on a GPU, a failed batch is marked once its results are
    there.

    The next batch has been started by then; as its tokens continue these, it is no loss that a failure of
    it may be noticed here.
    """
    for served in served_models():
        if served.is_asynchronous:
            _end_if_failed(served, scheduler, batch, result)


def add_report(result: Any, controller: Any, request: Any) -> None:
    """After `SchedulerInternalStateController.get_internal_state`: what /server_info shows as `kt`."""
    for served in served_models():
        result.internal_state[REPORT_KEY] = served.hybrid.report()


def record_distribution(original: Callable, scheduler: Any, request: Any) -> Any:
    """Around `Scheduler.expert_distribution_handle`: start, stop and write our record, and SGLang's own if it
    has one.
    """
    from sglang.srt.managers.io_struct import ExpertDistributionReqOutput, ExpertDistributionReqType
    from sglang.srt.runtime_context import get_exec

    recorders = [served.recorder for served in served_models() if served.recorder is not None]
    for recorder in recorders:
        if request.action == ExpertDistributionReqType.START_RECORD:
            recorder.start()
        elif request.action == ExpertDistributionReqType.STOP_RECORD:
            recorder.stop()
        elif request.action == ExpertDistributionReqType.DUMP_RECORD:
            _write(recorder)
    if recorders and get_exec().moe.expert_distribution_recorder_mode is None:
        return ExpertDistributionReqOutput()  # SGLang's recorder would end the server
    return original(scheduler, request)


def _write(recorder: DistributionRecorder) -> None:
    from sglang.srt.environ import envs

    try:
        path = recorder.save(envs.SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR.get())
    except (KTError, OSError) as error:
        logger.error("the expert distribution is not written: %s", error)
    else:
        logger.info("the expert distribution is written to %s", path)


def _is_chunk(scheduler: Any, batch: Any) -> bool:
    return scheduler.chunked_req is not None and scheduler.chunked_req in batch.reqs


def _end_if_failed(served: ServedModel, scheduler: Any, batch: Any, result: Any) -> None:
    if served.is_asynchronous and getattr(result, "copy_done", None) is not None:
        result.copy_done.synchronize()
    failure = served.take_failure()
    if failure is not None:
        _end(scheduler, batch, failure)


def _end(scheduler: Any, batch: Any, sentence: str) -> None:
    """Finish the batch's requests with an error; nothing that they computed is kept.

    These are SGLang's own ways for prompts whose keys and values could not be loaded: one for requests that
    the step completes (prefill), one for those that go on (decoding), one for a prompt cut into chunks.
    """
    from sglang.srt.managers.schedule_batch import FINISH_ABORT

    for request in batch.reqs:
        if not request.finished():
            reason = FINISH_ABORT(sentence, HTTPStatus.INTERNAL_SERVER_ERROR, "InternalServerError")
            request.discard_output_reason = reason
            request.to_finish = reason
            request.skip_radix_cache_insert = True
    if _is_chunk(scheduler, batch):
        scheduler._pending_chunked_abort_req = scheduler.chunked_req
