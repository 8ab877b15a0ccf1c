"""`kt chat` against a stand-in server: what is sent, what is shown, what is forgotten."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput
from typer.testing import CliRunner

from kt_kernel.cli.conversation.commands import COMMANDS
from kt_kernel.cli.conversation.reading import terminal_session
from kt_kernel.cli.conversation.screen import TerminalScreen
from kt_kernel.cli.conversation.settings import ChatSettings
from kt_kernel.cli.main import app

# Questions during whose reasoning the answer breaks off, and what comes then.
BREAKS = {
    "error": 'data: {"error": {"message": "out of memory"}}\n\n',
    "garbage": "data: {oops\n\n",
}


class Handler(BaseHTTPRequestHandler):
    """Answers like an OpenAI-compatible server: the pieces "Par" and "is."; 500 to the question "fail"."""

    received: list[dict]

    def do_GET(self) -> None:
        if self.headers["Authorization"] == "Bearer wrong":
            self.send_error(401)
            return
        self._reply("application/json", json.dumps({"object": "list", "data": [{"id": "demo"}]}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.received.append(body)
        if body["messages"][-1]["content"] == "fail":
            self.send_error(500)
            return
        deltas = [{"content": text} for text in ("Par", "is.")]
        if body["messages"][-1]["content"] == "think":
            deltas = [{"reasoning_content": text} for text in ("Let me ", "see.")] + deltas
        pieces = [{"choices": [{"index": 0, "delta": delta}]} for delta in deltas]
        usage = {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}
        pieces.append({"choices": [], "usage": usage})
        lines = [f"data: {json.dumps(piece)}\n\n" for piece in pieces]
        if body["messages"][-1]["content"] in BREAKS:
            piece = {"choices": [{"index": 0, "delta": {"reasoning_content": "Let me"}}]}
            lines = [f"data: {json.dumps(piece)}\n\n", BREAKS[body["messages"][-1]["content"]]]
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
    chat(server, "fail", "again", "/quit")
    assert sent(server)[-1] == [("user", "again")]


@pytest.mark.parametrize("question", ["fail", "/halp", "/save /no/such/folder/x.md"])
def test_errors_in_a_pipe_go_to_standard_error_and_the_exit_status(server, question):
    result = chat(server, "hello", question, "again")
    assert result.exit_code == 1
    assert result.stdout == "Paris.\nParis.\n"
    assert len([line for line in result.stderr.splitlines() if line.startswith("kt: ")]) == 1


@pytest.mark.parametrize("question", BREAKS)
def test_an_answer_that_breaks_off_leaves_no_dim_letters(server, question, monkeypatch):
    monkeypatch.setattr("kt_kernel.cli.chat.screen", TerminalScreen)
    result = chat(server, question)
    assert result.exit_code == 1
    assert result.stdout == "\033[2mLet me\033[0m\n"
    assert "kt: The server did not answer: " in result.stderr


def test_unknown_command_is_not_sent_and_two_slashes_are_a_question(server):
    result = chat(server, "/halp", "//halp", "/quit")
    assert "There is no command /halp: /help lists them." in result.stderr
    assert sent(server) == [[("user", "/halp")]]


def test_every_command_is_in_the_help(server):
    shown = chat(server, "/help", "/quit").stdout
    assert all(f"\n{name} " in shown for name in COMMANDS)
    assert max(map(len, shown.splitlines())) <= 80


def test_only_answers_go_to_standard_output(server):
    result = chat(server, "hello")
    assert result.stdout == "Paris.\n"
    assert "[5 tokens, first after " in result.stderr and "tokens/s]" in result.stderr


def test_reasoning_is_shown_before_the_answer_and_not_sent_again(server):
    result = chat(server, "think", "sure?")
    assert result.stdout.startswith("[reasoning]\nLet me see.\n[answer]\nParis.\n")
    assert sent(server)[1][1] == ("assistant", "Paris.")


def test_reasoning_is_dim_in_a_terminal(capsys):
    screen = TerminalScreen()
    screen.reasoning("so"), screen.reasoning(" so"), screen.content("\n\nyes"), screen.end("2 tokens")
    dim, normal = "\033[2m", "\033[0m"
    assert capsys.readouterr().out == f"{dim}so so{normal}\n\nyes{normal}\n{dim}[2 tokens]{normal}\n"


def test_retry_asks_the_same_without_the_first_answer(server):
    chat(server, "/retry", "one", "two", "/retry")
    assert sent(server)[2] == sent(server)[1] == [("user", "one"), ("assistant", "Paris."), ("user", "two")]


def test_system_message_can_be_shown_replaced_and_removed(server):
    result = chat(server, "/system be brief", "one", "/system", "/system -", "two")
    assert result.stdout.count("System message: be brief") == 2
    assert sent(server)[0][0] == ("system", "be brief")
    assert sent(server)[1][0] == ("user", "one")


def test_history_and_info_say_what_was_said(server):
    result = chat(server, "one", "/history", "/info", options=("-t", "0.5"))
    assert "## You\n\none\n\n## Model\n\nParis." in result.stdout
    assert "temperature 0.5, at most 2048 tokens" in result.stdout
    assert "1 question, 12 tokens" in result.stdout


def test_saved_conversation_is_complete_and_replaces_no_file(server, tmp_path):
    text, data = tmp_path / "notes.md", tmp_path / "notes.json"
    result = chat(server, "one", f"/save {text}", f"/save {data}", f"/save {text}")
    assert "## You\n\none" in text.read_text()
    assert json.loads(data.read_text()) == [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "Paris."},
    ]
    assert f"{text} exists already" in result.stderr


def test_lines_that_go_on_are_one_question(server):
    chat(server, "one \\", "two", '"""', "three", "", 'four"""')
    assert [messages[-1][1] for messages in sent(server)] == ["one \ntwo", "three\n\nfour"]


@pytest.mark.parametrize(
    ("typed", "text"),
    [
        ("one\r", "one"),
        ("one\\\rtwo\r", "one\\\ntwo"),
        ("one\x1b\rtwo\r", "one\ntwo"),
        ('"""a\rb"""\r', '"""a\nb"""'),
    ],
)
def test_keys_of_a_terminal(typed, text):
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        keys.send_text(typed)
        assert terminal_session().prompt("> ") == text


def test_another_key_is_one_sentence(server):
    result = chat(server, options=("--api-key", "wrong"))
    assert result.exit_code == 1
    assert "refuses the key" in result.stderr


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
