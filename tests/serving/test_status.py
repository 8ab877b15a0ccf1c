"""/kt, /kt/status and /metrics: what they say, to whom, and what it costs."""

from __future__ import annotations

import asyncio
import base64
import functools
import hashlib
import re
from types import SimpleNamespace

import pytest
import torch
from prometheus_client import CollectorRegistry, generate_latest, make_asgi_app
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.testclient import TestClient
from status_figures import KEY, REPORT, Manager, application, later

from kt_kernel.integrations.sglang.status import machine, routes, served
from kt_kernel.integrations.sglang.status import reader as reader_module
from kt_kernel.integrations.sglang.status.metrics import METRICS, OF_EACH_RANK, StatusMetrics
from kt_kernel.integrations.sglang.status.page import page_text
from kt_kernel.integrations.sglang.status.reader import StatusReader
from kt_kernel.integrations.sglang.status.tokens import TokenCounts

BEARER = {"Authorization": f"Bearer {KEY}"}


@pytest.fixture(autouse=True)
def hooked(monkeypatch):
    from sglang.srt.utils import auth

    around = functools.partial(routes.open_page, auth.decide_request_auth)
    monkeypatch.setattr(auth, "decide_request_auth", around)


# ---- the page ------------------------------------------------------------------------------------


def test_the_page_needs_nothing_from_elsewhere():
    page = page_text()
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\(|<(link|script)[^>]+(src|href)=(?!\"data:)", page)
    assert len(page) < 30_000


def test_the_page_makes_no_markup_of_what_the_server_says():
    """Only textContent, attributes and numbers; test_status_browser.py tries hostile names."""
    forbidden = (
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|\son\w+=|\sstyle="
    )
    assert not re.findall(forbidden, page_text())


def test_nothing_but_the_pages_own_script_may_run():
    answer = TestClient(application(Manager(REPORT))).get("/kt")
    policy = answer.headers["Content-Security-Policy"]
    (script,) = re.findall(r"<script>(.*?)</script>", answer.text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy and "unsafe" not in policy


# ---- the key -------------------------------------------------------------------------------------


def test_figures_need_the_key_and_the_page_without_it_is_a_401_that_asks_for_it():
    manager = Manager(REPORT)
    client = TestClient(application(manager, KEY))
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}, {"Authorization": ""}):
        assert client.get("/kt/status", headers=headers).status_code == 401
        page = client.get("/kt", headers=headers)
        assert (page.status_code, page.text) == (401, page_text())
    assert manager.asked == 0
    assert client.get("/kt/status", headers=BEARER).json()["model"] == "a model"
    assert client.get("/kt", headers=BEARER).status_code == 200


@pytest.mark.parametrize("path", ["/kt/", "/kt/status/", "/ktx", "/kt%2Fstatus", "/kt/../kt/status", "//kt"])
def test_only_the_page_itself_is_open(path):
    client = TestClient(application(Manager(REPORT), KEY), follow_redirects=False)
    assert client.get(path).status_code == 401


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
def test_nothing_can_be_changed(method):
    client = TestClient(application(Manager(REPORT), KEY))
    for path in ("/kt", "/kt/status"):
        assert client.request(method, path, headers=BEARER).status_code == 405
        assert client.request(method, path).status_code == 401


def test_a_server_without_a_key_shows_everything():
    client = TestClient(application(Manager(REPORT)))
    assert client.get("/kt").status_code == client.get("/kt/status").status_code == 200


# ---- the figures ---------------------------------------------------------------------------------


def test_the_answer_has_the_report_of_the_scheduler_that_has_one_and_no_options_of_the_server():
    status = TestClient(application(Manager(REPORT))).get("/kt/status").json()
    assert status["kt"] == REPORT
    assert status["first_of"] == {"replicas": 4, "stages": 1, "ranks": 2}
    assert set(status) == {"model", "model_path", "versions", "first_of", "age", "kt", "memory_usage"}


def test_many_who_look_cost_one_question_a_second_and_nobody_none(monkeypatch):
    manager = Manager(REPORT, later())
    now = [1000.0]
    monkeypatch.setattr(reader_module, "time", SimpleNamespace(monotonic=lambda: now[0]))

    async def look() -> list:
        reader = StatusReader(manager.get_internal_state)
        await asyncio.sleep(0.05)
        assert manager.asked == 0
        answers = await asyncio.gather(*(reader.read(5) for _ in range(50)))
        now[0] += 1.1
        return [*answers, await reader.read(5)]

    answers = asyncio.run(look())
    assert manager.asked == 2
    assert [answer.states[1]["kt"]["time"] for answer in answers] == [100.0] * 50 + [102.0]


def test_a_busy_scheduler_is_asked_once_and_the_last_answer_comes_with_its_age():
    busy = asyncio.Event
    asked = 0

    async def look() -> None:
        free = busy()

        async def ask() -> list[dict]:
            nonlocal asked
            asked += 1
            if asked > 1:
                await free.wait()
            return [{"number": asked}]

        reader = StatusReader(ask, fresh=0.0)
        assert (await reader.read(5)).states == [{"number": 1}]
        for _ in range(3):
            answer = await reader.read(0.02)
            assert answer.states == [{"number": 1}] and answer.age > 0
        assert asked == 2  # the question that waits was not given up, nor asked again
        free.set()
        assert (await reader.read(5)).states == [{"number": 2}]

    asyncio.run(look())


def test_a_scheduler_that_never_answered_is_a_sentence(monkeypatch):
    monkeypatch.setattr(routes, "_STATUS_PATIENCE", 0.05)

    async def never() -> list[dict]:
        raise RuntimeError("gone")

    manager = Manager(REPORT)
    manager.get_internal_state = never
    answer = TestClient(application(manager)).get("/kt/status")
    assert answer.status_code == 503 and "has not answered" in answer.json()["error"]


# ---- tokens --------------------------------------------------------------------------------------


def batch(*middle_chunks: int, prefill: bool = True, **stats: int) -> SimpleNamespace:
    """A batch of requests with so many unfinished chunks each."""
    return SimpleNamespace(
        forward_mode=SimpleNamespace(is_extend=lambda: prefill),
        reqs=[SimpleNamespace(inflight_middle_chunks=chunks) for chunks in middle_chunks],
        prefill_stats=SimpleNamespace(**stats) if stats else None,
    )


def test_tokens_are_counted_once_whoever_computes_them():
    counts = TokenCounts()
    counts.count_prefill(batch(1, log_input_tokens=100, log_hit_tokens=0, reprocessed_log_hit_tokens=0))
    # The rest of it, another prompt found whole but for a token, and a request that decodes on.
    counts.count_prefill(
        batch(0, 0, 0, log_input_tokens=31, log_hit_tokens=80, reprocessed_log_hit_tokens=20)
    )
    counts.count_prefill(batch(0, prefill=False))
    counts.count_decode(2)
    counts.count_prefill(batch(0, 0))  # decoding turned into a prefill: no prompt
    assert counts == TokenCounts(prompt=131, cached=60, output=7)


# ---- the machine ---------------------------------------------------------------------------------


def test_cores_are_never_busier_than_there_is_time():
    busy, idle = machine.core_seconds()
    busy_later, idle_later = machine.core_seconds()
    assert busy > 0 and idle > 0
    assert busy_later >= busy
    assert (busy + idle) <= (busy_later + idle_later) + 1


def test_a_gpu_is_read_without_a_context_on_it(monkeypatch):
    fake = {
        "device_count": lambda: 3,
        "get_device_properties": lambda index: SimpleNamespace(name=f"GPU {index}", total_memory=1000),
        "device_memory_used": lambda index: 100 * index,
        "utilization": lambda index: 50,
        "mem_get_info": lambda *index: pytest.fail("this makes a context"),
    }
    for name, function in fake.items():
        monkeypatch.setattr(torch.cuda, name, function)

    def missing(index: int) -> int:
        if index == 1:
            raise RuntimeError("no driver")
        return 50

    monkeypatch.setattr(torch.cuda, "utilization", missing)
    gpus = machine.machine_use(torch.device("cuda:0"), 4)["gpus"]
    assert gpus == [
        {"name": "GPU 0", "used": 0, "total": 1000, "busy": 0.5},
        {"name": "GPU 2", "used": 200, "total": 1000, "busy": 0.5},
    ]
    assert machine.machine_use(torch.device("cpu"), 4)["gpus"] == []


# ---- Prometheus ----------------------------------------------------------------------------------


def sample(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    return registry.get_sample_value(name, labels)


def test_every_figure_is_a_metric_and_a_total_never_goes_back():
    registry = CollectorRegistry()
    metrics = StatusMetrics(registry)
    metrics.update(REPORT)
    metrics.update(later())
    metrics.update(REPORT)
    assert sample(registry, "kt_output_tokens_total") == 540
    assert sample(registry, "kt_cached_tokens_total") == 1000
    assert sample(registry, "kt_cpu_read_bytes_total") == 70e9
    assert sample(registry, "kt_cpu_read_limit_bytes_per_second") == 40e9
    assert sample(registry, "kt_expert_hits_total") == 300 and sample(registry, "kt_expert_uses_total") == 400
    assert sample(registry, "kt_copied_bytes_total", purpose="prefill") == 6000
    assert sample(registry, "kt_core_seconds_total", state="busy") == 1002
    assert sample(registry, "kt_gpu_busy_ratio", gpu="0") == 0.5
    text = generate_latest(registry).decode()
    assert all(f"# HELP {metric.name} " in text for metric in METRICS)


def test_a_limit_that_was_not_measured_is_left_out():
    registry = CollectorRegistry()
    report = later()
    report["machine"]["read_limit"] = None
    StatusMetrics(registry).update(report)
    assert sample(registry, "kt_cpu_read_limit_bytes_per_second") is None


def test_ranks_that_share_a_model_count_its_tokens_once():
    registry = CollectorRegistry()
    StatusMetrics(registry).update(REPORT, OF_EACH_RANK)
    assert sample(registry, "kt_cpu_read_bytes_total") > 0
    assert sample(registry, "kt_output_tokens_total") == 0


def test_a_scheduler_whose_figures_fail_goes_on(monkeypatch, caplog):
    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(served, "figures", lambda *_: {"tokens": {}})
    monkeypatch.setattr(served, "publish", full)
    assert served.add_figures({"experts": 8}, None, None) == {"experts": 8}
    assert "no space left" in caplog.text


def test_the_scheduler_is_asked_before_metrics_are_written():
    registry = CollectorRegistry()
    metrics = StatusMetrics(registry)
    manager = Manager(later())
    ask = manager.get_internal_state

    async def ask_and_write() -> list[dict]:
        states = await ask()
        metrics.update(states[1]["kt"])
        return states

    manager.get_internal_state = ask_and_write
    app = Starlette()
    routes.serve_status(app, manager, None)
    app.routes.append(Mount("/metrics", make_asgi_app(registry=registry)))
    routes.read_before_metrics(None, app)
    assert "kt_output_tokens_total 540.0" in TestClient(app).get("/metrics/").text
    assert manager.asked == 1
