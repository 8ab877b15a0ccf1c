"""`kt bench serve` against a stand-in server: what is counted, what is left of a failure."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kt_kernel.bench.serving import report
from kt_kernel.bench.serving.figures import Figures, Level, Spread, figures, spread_ms
from kt_kernel.bench.serving.prompts import Prompts
from kt_kernel.bench.serving.requests import Sample
from kt_kernel.cli.main import app

WARM_UP = 2  # requests
# Models of which the answers cannot be read once they are measured.
UNREADABLE = {
    "cut": '{"choices": [{"te',
    "list": "[1]",
    "no count": '{"choices": [{"text": "x"}], "usage": {"prompt_tokens": 1}}',
}
EXTRA_TOKENS = 3  # a real one adds a token for the beginning


class Handler(BaseHTTPRequestHandler):
    """A word is two tokens; each token of an answer is a piece. Model "refuse": 400."""

    first_seconds = 0.0
    gap_seconds = 0.0
    received: list[dict]
    together: list[int]
    running = 0
    lock = threading.Lock()

    def do_GET(self) -> None:
        self._head("application/json")
        self.wfile.write(json.dumps({"object": "list", "data": [{"id": "tiny"}]}).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.lock:
            self.received.append(body)
            Handler.running += 1
            self.together.append(Handler.running)
        try:
            self._answer(body)
        finally:
            with self.lock:
                Handler.running -= 1

    def _answer(self, body: dict) -> None:
        if body["model"] == "refuse":
            self.send_error(400, "too long")
            return
        self._head("text/event-stream")
        if body["model"] in UNREADABLE and len(self.received) > WARM_UP:
            self.wfile.write(f"data: {UNREADABLE[body['model']]}\n\n".encode())
            return
        time.sleep(self.first_seconds)
        for number in range(body["max_tokens"]):
            self._send({"choices": [{"text": "x"}]})
            if number < body["max_tokens"] - 1:
                time.sleep(self.gap_seconds)
        prompt = 2 * len(body["prompt"].split()) + EXTRA_TOKENS
        self._send(
            {"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": body["max_tokens"]}}
        )
        self.wfile.write(b"data: [DONE]\n\n")

    def _head(self, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.end_headers()

    def _send(self, event: dict) -> None:
        self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
        self.wfile.flush()

    def log_message(self, *arguments: object) -> None:
        """Keep test output clean."""


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    Handler.received, Handler.together = [], []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield str(server.server_address[1])
    server.shutdown()
    thread.join()
    server.server_close()


def bench(port: str, *options: str):
    return CliRunner().invoke(app, ["bench", "serve", "--port", port, *options])


def rows(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines() if line.strip()[:1].isdigit()]


def test_a_line_for_every_combination_within_80_columns(port):
    result = bench(port, "-u", "2,1", "--prompt-tokens", "64,16", "--output-tokens", "4,5")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("tiny at http://127.0.0.1:")
    assert max(map(len, result.stdout.splitlines())) <= 80
    asked = [(users, output) for _ in range(2) for output in ("4", "5") for users in ("1", "2")]
    assert [(row[0], row[2]) for row in rows(result.stdout)] == asked


def test_prompts_have_the_wanted_length_as_the_server_counts(port):
    result = bench(port, "-u", "1", "--prompt-tokens", "101", "--json")
    assert json.loads(result.stdout)["prompt_tokens"] == 101
    prompts = [body["prompt"] for body in Handler.received]
    assert len({prompt[:40] for prompt in prompts}) == len(prompts), "a common beginning may be cached"


def test_users_ask_at_the_same_time_and_each_request_is_counted(port, monkeypatch):
    monkeypatch.setattr(Handler, "first_seconds", 0.05)
    result = bench(port, "-u", "3", "-n", "7", "--output-tokens", "2", "--json")
    line = json.loads(result.stdout)
    assert line["finished"] == 7 and line["failed"] == 0
    assert max(Handler.together) == 3
    assert len(Handler.received) == 2 + 7  # two to learn the length of words


def test_delays_of_the_server_are_found_again(port, monkeypatch):
    monkeypatch.setattr(Handler, "first_seconds", 0.2)
    monkeypatch.setattr(Handler, "gap_seconds", 0.04)
    line = json.loads(bench(port, "-u", "1", "-n", "1", "--output-tokens", "5", "--json").stdout)
    # Never less than the server slept; how much more depends on the machine's other work.
    assert line["ttft_ms"]["median"] >= 200
    assert line["tpot_ms"]["median"] >= 40 and line["itl_ms"]["median"] >= 40
    assert line["seconds"] >= 0.2 + 4 * 0.04
    assert line["output_tokens_per_s"] == pytest.approx(5 / line["seconds"])


def test_failed_requests_are_counted_and_the_first_is_shown(port):
    good = bench(port, "-u", "1", "-n", "2", "--json")
    assert good.exit_code == 0
    result = bench(port, "--model", "refuse")
    assert result.exit_code == 1
    assert "the server answered 400" in result.stderr and len(result.stderr.splitlines()) == 1


def test_ctrl_c_shows_what_was_finished(port, monkeypatch):
    monkeypatch.setattr(Handler, "gap_seconds", 0.01)
    command = [
        Path(sys.executable).with_name("kt"),
        "bench",
        "serve",
        "--port",
        port,
        "-n",
        "1000",
        "-u",
        "1,2",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        deadline = time.monotonic() + 60
        while len(Handler.received) < 5 and time.monotonic() < deadline:
            time.sleep(0.05)
        running.send_signal(signal.SIGINT)
        stdout, stderr = running.communicate(timeout=60)
    assert running.returncode == 130, stderr
    assert len(rows(stdout)) == 1 and "Traceback" not in stderr
    assert "stopped" in stderr


@pytest.mark.parametrize("model", UNREADABLE)
def test_an_unreadable_answer_is_a_failed_request(port, model):
    result = bench(port, "--model", model, "-u", "2")
    assert result.exit_code == 1, result.exception
    assert "kt: 4 requests failed; the first: the server" in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", ["x.jpeg2", "chart", "no/such/folder/x.png", "folder.png", "x.png/y.png"])
def test_a_chart_that_cannot_be_written_is_refused_before_anything_is_measured(port, tmp_path, name):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "x.png").touch()
    result = bench(port, "--png", str(tmp_path / name))
    assert result.exit_code == 1
    assert "--png" in result.stderr and "matplotlib" not in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert Handler.received == []


@pytest.mark.parametrize("options", [("-u", "0"), ("--prompt-tokens", "few"), ("--output-tokens", "")])
def test_impossible_numbers_are_one_sentence(port, options):
    result = bench(port, *options)
    assert result.exit_code == 1
    assert result.stderr.startswith("kt: ") and len(result.stderr.splitlines()) == 1


def test_no_server_is_one_sentence(unused_port="9"):
    result = bench(unused_port)
    assert result.exit_code == 1
    assert f"No server answers at http://127.0.0.1:{unused_port}" in result.stderr


def test_a_chart_without_matplotlib_is_refused_before_anything_is_measured(port, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = bench(port, "--png", str(tmp_path / "x.png"))
    assert result.exit_code == 1
    assert "pip install matplotlib" in result.stderr
    assert Handler.received == []


def test_chart_shows_every_level(tmp_path):
    pytest.importorskip("matplotlib")
    spread = Spread(1.0, 2.0)
    levels = [Level(users, prompt, 8) for prompt in (16, 64) for users in (1, 2)]
    done = [Figures(level, 1, 0, 1.0, 16.0, 8.0, spread, spread, None, 8.0, 24.0) for level in levels]
    report.draw(tmp_path / "x.png", "tiny", done)
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_figures_follow_from_the_times():
    level = Level(2, 8, 4)
    samples = [Sample(0.0, [1.0, 1.5, 2.0, 2.5], 8, 4), Sample(0.0, [3.0], 8, 1)]
    found = figures(level, samples, failed=1, seconds=5.0)
    assert found.ttft_ms == Spread(1000.0, 3000.0)
    assert found.tpot_ms == Spread(500.0, 500.0)  # an answer of one token has none
    assert found.output_tokens_per_s == 1.0 and found.total_tokens_per_s == 21 / 5
    assert figures(level, [], failed=1, seconds=1.0).ttft_ms is None


def test_percentiles_are_values_that_occurred():
    assert spread_ms([n / 1e3 for n in range(1, 21)]) == Spread(pytest.approx(10), pytest.approx(19))
    assert spread_ms([0.004]) == Spread(4.0, 4.0)
    assert spread_ms([]) is None


def test_the_same_seed_asks_the_same():
    assert Prompts(1).text(50) == Prompts(1).text(50) != Prompts(2).text(50)
