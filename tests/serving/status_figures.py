"""What a scheduler says of itself, written by hand, and an application that serves it as SGLang's does."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

from starlette.applications import Starlette

from kt_kernel.integrations.sglang.status import routes

KEY = "the key"
# Whatever a model's maker or a user put into a name must come out as text.
HOSTILE = "<img src=x onerror=\"document.title='run'\">&amp;\"'`${1}"

LAYERS = [
    {
        "layer": 1,
        "device_experts": [0, 2, 3],
        "capacity": 3,
        "version": 1,
        "hit_rate": 0.75,
        "uses": 400,
        "expert_uses": [100, 0, 150, 50, 100, 0, 0, 0],
    },
    {
        "layer": 2,
        "device_experts": [],
        "capacity": 0,
        "version": 0,
        "hit_rate": None,
        "uses": 0,
        "expert_uses": [0] * 8,
    },
]

REPORT: dict[str, Any] = {
    "time": 100.0,
    "method": "FP8",
    "layers": LAYERS,
    "experts": 16,
    "device_experts": 3,
    "hit_rate": 0.75,
    "updates": 2,
    "experts_moved": 5,
    "bytes_copied": 7000,
    "bytes": {"update": 1000, "prefill": 6000, "misses": 0},
    "prefill": {"threshold": 512, "chunks": 7, "fallbacks": 1},
    "cpu": {"calls": 100, "seconds": 2.0, "bytes": 60_000_000_000, "gb_per_s": 30.0},
    "memory": [{"what": "CPU experts, packed", "where": "host", "bytes": 5_000_000_000}],
    "deferred": 0,
    "miss_policy": "cpu",
    "tokens": {"prompt": 3000, "cached": 1000, "output": 500},
    "requests": {"running": 2, "waiting": 1},
    "machine": {
        "cpu": "A CPU",
        "threads": 2,
        "read_limit": 40e9,
        "cores": {"busy_seconds": 1000.0, "idle_seconds": 3000.0},
        "memory": {"total": 24_000_000_000, "available": 6_000_000_000, "scheduler": 9_000_000_000},
        "gpus": [{"name": "A GPU", "used": 12_000_000_000, "total": 24_000_000_000, "busy": 0.5}],
    },
}


def later(seconds: float = 2.0) -> dict[str, Any]:
    """After REPORT: 40 tokens written, 10 GB read in half a second, half of the cores busy."""
    report = copy.deepcopy(REPORT)
    report["time"] += seconds
    report["tokens"]["output"] += 40
    report["cpu"] |= {"calls": 110, "seconds": 2.5, "bytes": 70_000_000_000}
    report["machine"]["cores"] = {"busy_seconds": 1002.0, "idle_seconds": 3002.0}
    return report


class Manager:
    """In the place of SGLang's TokenizerManager: gives the next of `reports`, the last again and again."""

    def __init__(self, *reports: dict[str, Any], model: str = "a model") -> None:
        self.served_model_name = model
        self.model_path = "/models/a model"
        self.server_args = SimpleNamespace(tp_size=2, pp_size=1, dp_size=4)
        self.reports = list(reports)
        self.asked = 0

    async def get_internal_state(self) -> list[dict[str, Any]]:
        self.asked += 1
        report = self.reports.pop(0) if len(self.reports) > 1 else self.reports[0]
        return [{}, {"kt": report, "memory_usage": {"weight": 1.5}, "tokenizer_path": "not shown"}]


def application(manager: Any, key: str | None = None) -> Starlette:
    """With SGLang's own middleware for the key, which asks our hook."""
    from sglang.srt.utils import auth

    app = Starlette()
    routes.serve_status(app, manager, key)
    auth.add_api_key_middleware(app, api_key=key, admin_api_key=None)
    return app
