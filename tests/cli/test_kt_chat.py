"""`kt chat` against a stand-in server: what is sent, what is shown, what is forgotten."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from typer.testing import CliRunner

from kt_kernel.cli.chat import ChatSettings
from kt_kernel.cli.main import app


class Handler(BaseHTTPRequestHandler):
    """Answers like an OpenAI-compatible server: the pieces "Par" and "is."; 500 to the question "fail"."""

    received: list[dict]

    def do_GET(self) -> None:
        self._reply("application/json", json.dumps({"object": "list", "data": [{"id": "demo"}]}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.received.append(body)
        if body["messages"][-1]["content"] == "fail":
            self.send_error(500)
            return
        pieces = [{"choices": [{"index": 0, "delta": {"content": text}}]} for text in ("Par", "is.")]
        pieces.append({"choices": []})  # a usage report has no choices
        lines = [f"data: {json.dumps(piece)}\n\n" for piece in pieces]
        self._reply("text/event-stream", "".join(lines) + "data: [DONE]\n\n")

    def _reply(self, kind: str, text: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *arguments: object) -> None:
        """Keep test output clean."""


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    Handler.received = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def chat(server: ThreadingHTTPServer, *lines: str, options: tuple[str, ...] = ()):
    arguments = ["chat", "--port", str(server.server_address[1]), *options]
    return CliRunner().invoke(app, arguments, input="\n".join(lines) + "\n")


def sent(server: ThreadingHTTPServer) -> list[list[tuple[str, str]]]:
    return [[(m["role"], m["content"]) for m in body["messages"]] for body in Handler.received]


def test_conversation_is_streamed_and_remembered(server):
    result = chat(server, "What is the capital of France?", "Sure?", "/quit")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("Paris.") == 2
    assert sent(server)[1] == [
        ("user", "What is the capital of France?"),
        ("assistant", "Paris."),
        ("user", "Sure?"),
    ]
    assert all(body["stream"] and body["model"] == "demo" for body in Handler.received)


@pytest.mark.parametrize(("options", "expected"), [((), None), (("-t", "0"), 0.0)])
def test_temperature_is_the_models_own_unless_given(server, options, expected):
    chat(server, "hello", "/quit", options=options)
    assert Handler.received[0].get("temperature") == expected


def test_clear_forgets_all_but_the_system_message(server):
    chat(server, "one", "/clear", "two", "/quit", options=("--system", "be brief"))
    assert sent(server)[1] == [("system", "be brief"), ("user", "two")]


def test_failed_question_does_not_stay_in_the_conversation(server):
    result = chat(server, "fail", "again", "/quit")
    assert "The server did not answer" in result.stdout
    assert sent(server)[-1] == [("user", "again")]


def test_unknown_command_is_not_sent(server):
    result = chat(server, "/help", "/quit")
    assert "There is no command /help: /clear, /quit." in result.stdout
    assert Handler.received == []


def test_end_of_input_ends_the_conversation(server):
    assert chat(server, "hello").exit_code == 0


def test_no_server_is_one_sentence(server):
    port = server.server_address[1]
    server.server_close()
    result = CliRunner().invoke(app, ["chat", "--port", str(port)])
    assert result.exit_code == 1
    assert f"No server answers at http://127.0.0.1:{port}/v1" in result.stderr


def test_ipv6_address_gets_its_brackets():
    assert ChatSettings("::1", 30000, "", "", 0.0, 1).base_url == "http://[::1]:30000/v1"
