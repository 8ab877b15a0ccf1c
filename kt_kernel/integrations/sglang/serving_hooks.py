"""Where SGLang's scheduler meets the hybrid model: before each step, after it, and when it is asked how
things are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from http import HTTPStatus
from typing import Any

from kt_kernel.errors import FeatureUnavailableError, KTError
from kt_kernel.hybrid.recording import DistributionRecorder
from kt_kernel.integrations.sglang import batch_failures
from kt_kernel.integrations.sglang.served_model import ServedModel, served_models
from kt_kernel.integrations.sglang.settings import SETTINGS_ATTRIBUTE
from kt_kernel.integrations.sglang.startup_failure import reported
from kt_kernel.integrations.sglang.status import served as status
from kt_kernel.integrations.sglang.status.tokens import COUNTS

logger = logging.getLogger(__name__)

REPORT_KEY = "kt"
DRAFT_REPORT_KEY = "kt_draft"


def begin_step(runner: Any, *arguments: Any, **options: Any) -> None:
    """Before `ModelRunner.forward`: the one moment in a step at which experts may change their places.

    A draft model has steps of its own.
    """
    for served in served_models():
        if served.settings.for_draft_model == runner.is_draft_worker:
            served.begin_step()


def counts_padding(original: Callable) -> bool:
    """Around `enable_num_token_non_padded`: rows that only fill up a graph's batch get the expert -1.

    Otherwise the CPU would compute them, and their experts would count as used. Not on a CPU, which has no
    graphs, and whose routing refuses the number.
    """
    return any(served.is_asynchronous for served in served_models()) or original()


def begin_serving(scheduler: Any) -> None:
    """Before `Scheduler.run_event_loop`: the requests begin here, warm-up passes and captures are over."""
    with reported():
        _require_cpu_experts(scheduler.server_args)
    for served in served_models():
        served.hybrid.forget()


def _require_cpu_experts(server_args: Any) -> None:
    """Some models of SGLang make their experts without asking who computes them: all are on the device then.

    A stage of a pipeline may have no experts.
    """
    if getattr(server_args, SETTINGS_ATTRIBUTE, None) is None or server_args.pp_size > 1:
        return
    if all(served.settings.for_draft_model for served in served_models()):
        raise FeatureUnavailableError(
            f"not available yet: CPU experts for {server_args.model_path}, whose code in SGLang 0.5.23 makes "
            "its experts in a way of its own, all on the device; serve this model without the --kt flags."
        )


def run_batch(original: Callable, scheduler: Any, batch: Any, *arguments: Any, **options: Any) -> Any:
    """Around `Scheduler.run_batch`: a failed batch is marked before the scheduler goes on.

    On a GPU the results come later, so only a chunk of a prompt is waited for: before the next one the
    scheduler puts its keys and values into the prefix cache, where other requests would find them.
    """
    with ExitStack() as computing:
        for served in served_models():
            computing.enter_context(served.batch(batch, scheduler.chunked_prefill_size))
        result = original(scheduler, batch, *arguments, **options)
    if (failure := batch_failures.take()) is not None:
        _end(scheduler, batch, failure)
    for served in served_models():
        if not served.is_asynchronous:
            _end_if_failed(served, scheduler, [batch])
        elif _is_chunk(scheduler, batch):
            scheduler.device_module.synchronize()
            _end_if_failed(served, scheduler, [batch, *_started(scheduler)])
    return result


def process_batch_result(scheduler: Any, batch: Any, result: Any) -> None:
    """Before `Scheduler.process_batch_result`: on a GPU, a failed batch is marked once its results are
    there.

    The next one may have been started by then, and the failure may be its: both end.
    """
    COUNTS.count_prefill(batch)
    for served in served_models():
        if served.is_asynchronous:
            if getattr(result, "copy_done", None) is not None:
                result.copy_done.synchronize()
            _end_if_failed(served, scheduler, [batch, *_started(scheduler)])


def add_report(result: Any, controller: Any, request: Any) -> None:
    """After `SchedulerInternalStateController.get_internal_state`: what /server_info shows as `kt`, and for
    the draft model as `kt_draft`.
    """
    for served in served_models():
        report = served.hybrid.report() | {"dense": _dense_layers(served)}
        if served.settings.for_draft_model:
            result.internal_state[DRAFT_REPORT_KEY] = report
            continue
        result.internal_state[REPORT_KEY] = status.add_figures(report, served, controller.scheduler)


def _dense_layers(served: ServedModel) -> dict[str, Any]:
    from kt_kernel.integrations.sglang.kept_layers import kept_layers

    kept = kept_layers(of_draft_model=served.settings.for_draft_model)
    return {} if kept is None else kept.report()


def record_distribution(original: Callable, scheduler: Any, request: Any) -> Any:
    """Around `Scheduler.expert_distribution_handle`: start, stop and write our record, and SGLang's own if it
    has one.
    """
    from sglang.srt.managers.io_struct import ExpertDistributionReqOutput, ExpertDistributionReqType
    from sglang.srt.runtime_context import get_exec

    models = served_models()
    for served in models:
        if served.recorder is not None:
            _tell(served.recorder, request.action, ExpertDistributionReqType)
    if not models or get_exec().moe.expert_distribution_recorder_mode is not None:
        return original(scheduler, request)
    # SGLang's own recorder is off, and would end the server.
    if not models[0].settings.records:
        logger.error("nothing is recorded: start the server with --record-kt-gpu-expert-distribution")
    return ExpertDistributionReqOutput()


def _tell(recorder: DistributionRecorder, action: Any, actions: Any) -> None:
    if action == actions.START_RECORD:
        recorder.start()
    elif action == actions.STOP_RECORD:
        recorder.stop()
    elif action == actions.DUMP_RECORD:
        _write(recorder)


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


def _started(scheduler: Any) -> list[Any]:
    """The batches whose results are still to be processed; there are some only with overlap scheduling."""
    return [batch for batch, _ in getattr(scheduler, "result_queue", ())]


def _end_if_failed(served: ServedModel, scheduler: Any, batches: list[Any]) -> None:
    failure = served.take_failure()
    if failure is not None and served.is_a_stage:
        # The other stages are on their way with this batch, and would wait for it for ever.
        raise KTError(f"a stage of the pipeline cannot go on: {failure}")
    if failure is not None:
        for batch in batches:
            _end(scheduler, batch, failure)


def _end(scheduler: Any, batch: Any, sentence: str) -> None:
    """Finish the batch's requests with an error; nothing that they computed is kept.

    These are SGLang's own ways for prompts whose keys and values could not be loaded: one for requests that
    the step completes (prefill), one for those that go on (decoding), one for a prompt cut into chunks.
    """
    from sglang.srt.managers.schedule_batch import FINISH_ABORT

    reason = FINISH_ABORT(sentence, HTTPStatus.INTERNAL_SERVER_ERROR, "InternalServerError")
    for request in batch.reqs:
        if not request.finished():
            request.discard_output_reason = reason
            request.to_finish = reason
            request.skip_radix_cache_insert = True
    if _is_chunk(scheduler, batch):
        scheduler._pending_chunked_abort_req = scheduler.chunked_req
