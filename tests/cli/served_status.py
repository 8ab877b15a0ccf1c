"""What the demo's server shows of itself; test_serve_demo.py imports these tests."""

from __future__ import annotations

import time

import requests

TOKENS = 6


def status_of(demo) -> dict:
    answer = requests.get(f"{demo.url}/kt/status", timeout=60)
    assert answer.ok, answer.text
    return answer.json()["kt"]


def status_from_now(demo) -> dict:
    """With all that tests before this one have asked for: the scheduler was asked after the call."""
    begin = time.monotonic()
    while True:
        answer = requests.get(f"{demo.url}/kt/status", timeout=60).json()
        if answer["age"] < time.monotonic() - begin - 0.01:
            return answer["kt"]
        assert time.monotonic() - begin < 120, answer["age"]
        time.sleep(0.2)


def later_status(demo, output: int) -> dict:
    """The first one with so many tokens written; answers are kept for a second."""
    deadline = time.monotonic() + 120
    while (report := status_of(demo))["tokens"]["output"] < output:
        assert time.monotonic() < deadline, report["tokens"]
        time.sleep(0.2)
    return report


def asked(demo, before: dict) -> tuple[dict, dict]:
    """What a request was said to cost, and the status after it."""
    answer = demo.client.completions.create(
        model="demo",
        prompt="Seventeen grey herons stood in the shallow water, and none of them moved.",
        max_tokens=TOKENS,
        temperature=0,
        extra_body={"ignore_eos": True},
    )
    return answer.usage, later_status(demo, before["tokens"]["output"] + TOKENS)


def grown(before: dict, after: dict) -> dict:
    return {name: after["tokens"][name] - before["tokens"][name] for name in before["tokens"]}


def test_the_status_counts_tokens_hits_and_uses(demo):
    before = status_from_now(demo)
    usage, after = asked(demo, before)
    first = grown(before, after)
    assert first["output"] == TOKENS
    assert first["prompt"] + first["cached"] == usage.prompt_tokens
    usage, last = asked(demo, after)
    assert grown(after, last)["cached"] >= usage.prompt_tokens - 1 > 0
    assert len(after["layers"]) == 30
    # Every token of the demo uses all eight experts of a layer.
    for old, new in zip(before["layers"], after["layers"], strict=True):
        (uses,) = {b - a for a, b in zip(old["expert_uses"], new["expert_uses"], strict=True)}
        assert uses == first["prompt"] + TOKENS - 1
        assert sum(new["expert_uses"]) == new["uses"] and new["device_experts"] == []


def test_the_status_knows_the_machine(demo):
    machine = status_of(demo)["machine"]
    assert machine["read_limit"] > 1e9  # kt run has measured it
    assert machine["memory"]["total"] > machine["memory"]["available"] > 0
    assert machine["memory"]["scheduler"] > 100_000_000 and machine["gpus"] == []


def test_prometheus_and_the_page_show_the_same(demo):
    text = requests.get(f"{demo.url}/metrics", timeout=60).text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("kt_"))
    report = status_of(demo)
    assert float(values["kt_output_tokens_total"]) == report["tokens"]["output"]
    assert float(values["kt_cpu_read_bytes_total"]) == report["cpu"]["bytes"]
    assert float(values["kt_experts"]) == 240
    page = requests.get(f"{demo.url}/kt", timeout=60)
    assert page.ok and page.headers["Content-Type"].startswith("text/html")
    assert "<script>" in page.text
