"""`kt top` against a stand-in server: which figures are shown, what is a rate and what a total, what if it is
gone.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from rich.console import Console
from typer.testing import CliRunner

from kt_kernel.cli.keys import pressed_keys
from kt_kernel.cli.main import app
from kt_kernel.cli.reading import Reading
from kt_kernel.cli.top import TopSettings, watch
from kt_kernel.cli.top_view import bar, percent, ranges, recent_hit_rate, screen_view, size, view

REPORT = {
    "layers": [
        {
            "layer": 1,
            "device_experts": [0, 1, 2, 7],
            "capacity": 4,
            "version": 3,
            "hit_rate": 0.5,
            "uses": 800,
        },
        {"layer": 2, "device_experts": [], "capacity": 0, "version": 0, "hit_rate": None, "uses": 0},
    ],
    "experts": 32,
    "device_experts": 4,
    "hit_rate": 0.5,
    "updates": 2,
    "experts_moved": 3,
    "bytes_copied": 6_000_000,
    "bytes": {"update": 1_000_000, "prefill": 5_000_000, "misses": 0},
    "prefill": {"threshold": 512, "chunks": 7, "fallbacks": 1},
    "cpu": {"calls": 100, "seconds": 2.0, "bytes": 80_000_000_000, "gb_per_s": 40.0},
    "deferred": 2,
    "miss_policy": "auto",
}


TOKENS = {"prompt": 3000, "cached": 1000, "output": 500}


def test_tokens_of_a_server_are_rates_and_the_share_that_the_prefix_cache_had():
    now = later() | {"tokens": TOKENS | {"output": 560, "prompt": 3100}}
    shown = text_of(REPORT | {"tokens": TOKENS}, now)
    assert "30.0/s written, 50.0/s of prompts; 24.4 % of prompts in the prefix cache" in shown
    assert "written" not in text_of(REPORT, later())


def later() -> dict:
    """Two seconds after REPORT: 200 experts used, 150 of them on the device."""
    report = copy.deepcopy(REPORT)
    report["layers"][0].update(uses=1000, hit_rate=0.55)
    report["cpu"].update(calls=110, seconds=3.0, bytes=130_000_000_000, gb_per_s=43.3)
    report["bytes_copied"] += 3_000_000
    return report


def text_of(before: dict, now: dict, trouble: str = "", width: int = 200) -> str:
    console = Console(width=width, force_terminal=False)
    with console.capture() as captured:
        console.print(view(Reading("tiny", before, 10.0), Reading("tiny", now, 12.0), trouble))
    return captured.get()


class Handler(BaseHTTPRequestHandler):
    """Answers /server_info with the next of `answers`, the last one again and again; None is an error."""

    answers: list[dict | None]

    def do_GET(self) -> None:
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if self.headers["Authorization"] == "Bearer wrong":
            self.send_error(401)
            return
        if self.path != "/server_info" or answer is None:
            self.send_error(500)
            return
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *arguments: object) -> None:
        """Keep test output clean."""


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def top(server: ThreadingHTTPServer, *answers: dict | None, readings: int = 1):
    Handler.answers = list(answers)
    port = str(server.server_address[1])
    options = ["--port", port, "--readings", str(readings), "--interval", "0.1"]
    return CliRunner().invoke(app, ["top", *options], env={"COLUMNS": "200"})


def test_every_figure_of_the_report_is_shown():
    shown = text_of(REPORT, REPORT)
    for figure in (
        "4 of 32 on the device (12.5 %)",
        "3 experts in 2 updates",
        "6.0 MB to the device (update 1.0 MB, prefill 5.0 MB, misses 0 B)",
        "from 512 tokens: 7 chunks, 1 without enough device memory",
        "40.0 GB/s in all of 100 calls",
        "policy auto, up to 2 of a token's experts one layer later",
        "4/4",
        "0-2 7",
    ):
        assert figure in shown, shown


def test_rates_are_those_between_two_readings_not_since_the_start():
    shown = text_of(REPORT, later())
    assert "75.0 % now, 50.0 % in all" in shown  # 150 of 200; the server's own total
    assert "1.5 MB/s now" in shown
    assert "50.0 GB/s in 10 calls, busy 50.0 %" in shown


def test_a_narrow_terminal_cuts_only_the_list_of_experts():
    report = later()
    report["layers"][0].update(device_experts=list(range(0, 256, 2)), capacity=128)
    shown = text_of(REPORT, report, width=80)
    assert "layer  slots    version  hits now" in shown, shown
    assert "128/128" in shown and "75.0 %" in shown and "55.0 %" in shown
    assert "0 2 4" in shown and "…" in shown


def test_an_idle_server_has_no_rates():
    shown = text_of(REPORT, REPORT)
    assert "- now, 50.0 % in all" in shown
    assert "idle in 0 calls, busy 0.0 %" in shown


def test_a_server_before_its_first_request_can_be_shown():
    fresh = copy.deepcopy(REPORT)
    fresh["hit_rate"] = fresh["layers"][0]["hit_rate"] = None
    fresh["layers"][0]["uses"] = 0
    fresh["cpu"] = {"calls": 0, "seconds": 0.0, "bytes": 0, "gb_per_s": None}
    shown = text_of(fresh, fresh)
    assert "- now, - in all" in shown
    assert "nothing in all of 0 calls" in shown


@pytest.mark.parametrize("wrap", [lambda kt: {"kt": kt}, lambda kt: {"internal_states": [{}, {"kt": kt}]}])
def test_report_is_found_in_the_servers_answer(server, wrap):
    result = top(server, {"model_path": "/models/tiny", **wrap(REPORT)})
    assert result.exit_code == 0, result.output
    assert "/models/tiny" in result.output
    assert "4 of 32 on the device" in result.output


def test_readings_follow_one_another(server):
    result = top(server, {"kt": REPORT}, {"kt": later()}, readings=2)
    assert result.exit_code == 0, result.output
    assert "- now, 50.0 % in all" in result.output
    assert "75.0 % now" in result.output


def test_a_pause_of_the_server_does_not_end_the_watch(server):
    result = top(server, {"kt": REPORT}, None, {"kt": later()}, readings=3)
    assert result.exit_code == 0, result.output
    assert "No server answers" in result.output
    assert "75.0 % now" in result.output


def test_a_restarted_server_shows_no_negative_rates(server):
    result = top(server, {"kt": later()}, {"kt": REPORT}, readings=2)
    assert "busy -" in result.output
    assert "-50" not in result.output and "-1" not in result.output


def test_a_terminal_shows_the_same(server):
    Handler.answers = [{"kt": REPORT}, {"kt": later()}]
    console = Console(width=200, height=40, force_terminal=True, record=True, legacy_windows=False)
    watch(TopSettings("127.0.0.1", server.server_address[1], 0.1, 2), console)
    assert "75.0 % now" in console.export_text()


def many_layers() -> dict:
    report = copy.deepcopy(REPORT)
    report["layers"] = [report["layers"][0] | {"layer": number} for number in range(48)]
    return report


def shown_on(height: int, first_layer: int, report: dict, trouble: str = "") -> tuple[list[str], int]:
    console = Console(width=80, height=height, force_terminal=False)
    reading = Reading("tiny", report, 10.0)
    with console.capture() as captured:
        text, first = screen_view(reading, reading, trouble, first_layer, console)
        console.print(text)
    return captured.get().splitlines(), first


@pytest.mark.parametrize(("wanted", "first"), [(0, 0), (5, 5), (-3, 0), (1000, None)])
@pytest.mark.parametrize(
    "trouble", ["", "No server answers at http://127.0.0.1:30000/server_info " + "x" * 99]
)
def test_layers_that_do_not_fit_can_be_scrolled_to(wanted, first, trouble):
    lines, now_first = shown_on(24, wanted, many_layers(), trouble)
    assert len(lines) <= 24
    numbers = [int(line.split()[0]) for line in lines if line[:2].strip().isdigit()]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers))) and len(numbers) >= 5
    assert numbers[0] == now_first == (48 - len(numbers) if first is None else first)
    assert lines[-1].startswith(f"layers {now_first + 1} to {numbers[-1] + 1} of 48")


def test_without_experts_on_a_device_nothing_is_said_of_hits():
    report = copy.deepcopy(REPORT) | {"device_experts": 0, "hit_rate": None}
    report["layers"] = [layer | {"capacity": 0, "device_experts": []} for layer in report["layers"]]
    shown = text_of(report, report)
    assert "0 of 32 on the device" in shown and "40.0 GB/s" in shown
    assert not any(word in shown for word in ("hit", "slots", "copied", "misses"))


def test_q_ends_the_watch_and_arrows_scroll(server, monkeypatch):
    Handler.answers = [{"kt": many_layers()}]
    pressed = iter(["down", "down", "up", "x", "q"])
    asked = []

    @contextmanager
    def keys():
        yield lambda seconds: asked.append(seconds) or next(pressed)

    monkeypatch.setattr("kt_kernel.cli.keys.pressed_keys", keys)
    console = Console(width=80, height=24, force_terminal=True, record=True, legacy_windows=False)
    watch(TopSettings("127.0.0.1", server.server_address[1], 60.0, None), console)
    assert len(asked) == 5 and "layers 3 to" in console.export_text()


@pytest.mark.parametrize(
    ("typed", "keys"),
    [
        ("q", ["q"]),
        ("\033[A\033OB", ["up", "down"]),
        ("\033[6~ x", ["page down", "page down", "x"]),
        ("", [""]),
    ],
)
def test_keys_are_read_without_enter_and_the_terminal_is_left_as_it_was(typed, keys, monkeypatch):
    ours, theirs = os.openpty()
    with os.fdopen(theirs, closefd=True) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        before = termios.tcgetattr(stdin.fileno())
        with pressed_keys() as wait:
            os.write(ours, typed.encode())
            assert [wait(5.0 if typed else 0.0) for _ in keys] == keys
        assert termios.tcgetattr(stdin.fileno()) == before
    os.close(ours)


def test_no_server_is_one_sentence(server):
    port = server.server_address[1]
    server.server_close()
    result = CliRunner().invoke(app, ["top", "--port", str(port)])
    assert result.exit_code == 1
    assert f"No server answers at http://127.0.0.1:{port}/server_info" in result.stderr


@pytest.mark.parametrize("answer", [{"version": "0.5.23"}, {"internal_states": [{"kt": None}]}])
def test_server_without_our_experts_is_one_sentence(server, answer):
    result = top(server, answer)
    assert result.exit_code == 1
    assert "reports no experts of kt-kernel" in result.stderr


def test_report_of_another_version_is_one_sentence(server):
    result = top(server, {"kt": {name: value for name, value in REPORT.items() if name != "prefill"}})
    assert result.exit_code == 1
    assert "lacks prefill" in result.stderr


def test_another_key_is_one_sentence(server):
    Handler.answers = [{"kt": REPORT}]
    options = ["--port", str(server.server_address[1]), "-n", "1", "--api-key"]
    assert CliRunner().invoke(app, ["top", *options, "right"]).exit_code == 0
    result = CliRunner().invoke(app, ["top", *options, "wrong"])
    assert result.exit_code == 1 and "refuses the key" in result.stderr


def test_ipv6_address_gets_its_brackets():
    assert TopSettings("::1", 30000, 1.0, None).url == "http://[::1]:30000/server_info"


def test_recent_hit_rate_ignores_layers_without_uses():
    layers = [{"uses": 10, "hit_rate": 1.0}, {"uses": 0, "hit_rate": None}]
    assert recent_hit_rate([], layers) == 1.0
    assert recent_hit_rate(layers, layers) is None


def test_figures_are_short():
    assert [size(count) for count in (0, 999, 1000, 1.5e9)] == ["0 B", "999 B", "1.0 kB", "1.5 GB"]
    assert ranges([5, 0, 1, 2]) == "0-2 5"
    assert ranges([]) == ""
    assert percent(None) == "-"
    assert bar(0.5).count("█") == bar(0.5).count("·")
