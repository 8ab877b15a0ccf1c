"""What clients of the HTTP server would be told wrongly, or sampled with wrongly, by SGLang 0.5.23 alone."""

from __future__ import annotations

from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from kt_kernel.integrations.sglang.settings import SETTINGS_ATTRIBUTE


def require_recording(manager: Any) -> None:
    """Before start, stop and dump of the expert distribution: a server that records nothing says so.

    SGLang answers 200 whatever the scheduler does, and without CPU experts its recorder ends the server.
    """
    from fastapi import HTTPException
    from sglang.srt.runtime_context import get_exec

    settings = getattr(manager.server_args, SETTINGS_ATTRIBUTE, None)
    if settings is not None and settings.records:
        return
    if get_exec().moe.expert_distribution_recorder_mode is None:
        raise HTTPException(
            HTTPStatus.BAD_REQUEST,
            "nothing is recorded: start the server with --record-kt-gpu-expert-distribution.",
        )


def ollama_sampling(
    original: Callable, serving: Any, options: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Around `OllamaServing._convert_options_to_sampling_params`: what a client leaves open is the model's.

    As with the server's other APIs. SGLang's own choice here is temperature 1 among all tokens, at which
    small models answer with random words. A negative `num_predict` is Ollama's "no limit".
    """
    if options and isinstance(options.get("num_predict"), int) and options["num_predict"] < 0:
        options = {name: value for name, value in options.items() if name != "num_predict"}
    return serving.tokenizer_manager.model_config.get_default_sampling_params() | original(serving, options)
