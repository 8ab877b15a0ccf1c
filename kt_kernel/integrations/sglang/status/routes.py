"""/kt, /kt/status and the freshness of /metrics in SGLang's HTTP server."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Any

from kt_kernel.integrations.sglang.settings import SETTINGS_ATTRIBUTE
from kt_kernel.integrations.sglang.status.page import HEADERS, page_text
from kt_kernel.integrations.sglang.status.reader import Answer, StatusReader

PAGE_PATH = "/kt"
STATUS_PATH = "/kt/status"
# Kept of the application, so that a second call finds it.
READER_ATTRIBUTE = "kt_status_reader"

_STATUS_PATIENCE = 10.0
# Prometheus gives up after 10 seconds, and SGLang's own figures need not wait for the scheduler.
_METRICS_PATIENCE = 2.0


def add_routes(result: Any, state: Any) -> None:
    """After `set_global_state`: a server with CPU experts shows them."""
    from sglang.srt.entrypoints import http_server
    from sglang.srt.runtime_context import get_serving

    manager = state.tokenizer_manager
    if getattr(getattr(manager, "server_args", None), SETTINGS_ATTRIBUTE, None) is not None:
        serve_status(http_server.app, manager, get_serving().api_key)


def serve_status(app: Any, manager: Any, key: str | None) -> None:
    """Add the routes to the Starlette application `app`.

    `manager`: SGLang's TokenizerManager; `key`: the server's, which its middleware asks for.
    """
    from starlette.responses import HTMLResponse, JSONResponse

    reader = StatusReader(manager.get_internal_state)
    setattr(app.state, READER_ATTRIBUTE, reader)

    async def page(request: Any) -> Any:
        status = 200 if has_key(request, key) else 401
        return HTMLResponse(page_text(), status, headers=HEADERS)

    async def figures(request: Any) -> Any:
        answer = await reader.read(_STATUS_PATIENCE)
        headers = {"Cache-Control": "no-store"}
        if answer is None:
            sentence = f"the scheduler has not answered for {_STATUS_PATIENCE:.0f} seconds; it is busy."
            return JSONResponse({"error": sentence}, 503, headers=headers)
        return JSONResponse(status_of(manager, answer), headers=headers)

    app.add_route(PAGE_PATH, page, methods=["GET"], include_in_schema=False)
    app.add_route(STATUS_PATH, figures, methods=["GET"], include_in_schema=False)


def status_of(manager: Any, answer: Answer) -> dict[str, Any]:
    """What /kt/status says: names, versions, and the report of the first scheduler that has one."""
    import sglang

    from kt_kernel import __version__

    state = next((state for state in answer.states if state.get("kt")), {})
    return {
        "model": manager.served_model_name,
        "model_path": manager.model_path,
        "versions": {"kt-kernel": __version__, "sglang": sglang.__version__},
        "first_of": _parts(manager.server_args),
        "age": answer.age,
        "kt": state.get("kt"),
        "memory_usage": state.get("memory_usage"),
    }


def _parts(server_args: Any) -> dict[str, int]:
    """How many schedulers there are of each kind; the first of them reports."""
    fields = {"replicas": "dp_size", "stages": "pp_size", "ranks": "tp_size"}
    return {part: getattr(server_args, field, 1) for part, field in fields.items()}


# ---- the key -------------------------------------------------------------------------------------


def has_key(request: Any, key: str | None) -> bool:
    """Does the request bring the server's key, if that has one?"""
    kind, _, given = request.headers.get("Authorization", "").partition(" ")
    return not key or (kind.lower() == "bearer" and secrets.compare_digest(given.encode(), key.encode()))


def open_page(original: Callable, *, method: str, path: str, **request: Any) -> Any:
    """Around `decide_request_auth`: a browser cannot send the key with an address, so the page comes without
    it (as a 401), holds nothing of the server, and asks for the key that /kt/status needs.
    """
    from sglang.srt.utils.auth import AuthDecision

    if path == PAGE_PATH and method in ("GET", "HEAD"):
        return AuthDecision(allowed=True)
    return original(method=method, path=path, **request)


# ---- /metrics ------------------------------------------------------------------------------------


def read_before_metrics(result: Any, app: Any) -> None:
    """After `add_prometheus_middleware`: the scheduler writes its metrics when they are asked for."""
    from starlette.routing import Mount

    reader = getattr(app.state, READER_ATTRIBUTE, None)
    mount = next((r for r in app.routes if isinstance(r, Mount) and r.path == "/metrics"), None)
    if reader is not None and mount is not None:
        mount.app = _AfterReading(mount.app, reader)


class _AfterReading:
    """An ASGI application that runs `app` once the figures are fresh, or it has waited long enough."""

    def __init__(self, app: Callable, reader: StatusReader) -> None:
        self._app = app
        self._reader = reader

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self._reader.read(_METRICS_PATIENCE)
        await self._app(scope, receive, send)
