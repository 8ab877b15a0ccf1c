"""The clients people use, against the served demo (test_serve_demo.py)."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import anthropic
import ollama
import pytest
import requests
from served_demo import Demo

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
ANSWER = "The capital of France is Paris."


@pytest.fixture(scope="module")
def messages(demo: Demo) -> anthropic.resources.Messages:
    return anthropic.Anthropic(base_url=demo.url, api_key="none").messages


@pytest.fixture(scope="module")
def ollama_client(demo: Demo) -> ollama.Client:
    return ollama.Client(host=demo.url)


def test_completions_and_responses_of_openai(demo):
    text = demo.client.completions.create(
        model="demo", prompt="The capital of France is", max_tokens=4, temperature=0
    )
    assert text.choices[0].text.strip().startswith("Paris")
    response = demo.client.responses.create(model="demo", input=QUESTION[0]["content"], max_output_tokens=40)
    assert response.output_text == ANSWER


def test_a_tool_that_is_asked_for_is_called_not_written_as_text(demo):
    """The demo is too small to choose tools, or to write sensible arguments."""
    tool = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
    answer = demo.client.chat.completions.create(
        model="demo",
        messages=QUESTION,
        tools=[{"type": "function", "function": tool}],
        tool_choice={"type": "function", "function": {"name": "weather"}},
        max_tokens=60,
        temperature=0,
    )
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "weather"
    assert not answer.choices[0].message.content


def test_anthropics_messages(messages):
    answer = messages.create(model="demo", max_tokens=40, messages=QUESTION)
    assert answer.content[0].text == ANSWER and answer.stop_reason == "end_turn"
    assert messages.count_tokens(model="demo", messages=QUESTION).input_tokens > 5


def test_anthropics_messages_arrive_in_pieces(messages):
    with messages.stream(model="demo", max_tokens=40, messages=QUESTION) as stream:
        pieces = list(stream.text_stream)
    assert "".join(pieces) == ANSWER and len(pieces) > 3


def test_ollama_samples_as_the_models_makers_say(ollama_client):
    """Without options. At SGLang's own temperature of 1 the demo's answers were random words."""
    assert ollama_client.chat(model="demo", messages=QUESTION).message.content == ANSWER
    pieces = [piece.message.content for piece in ollama_client.chat("demo", messages=QUESTION, stream=True)]
    assert "".join(pieces) == ANSWER and len(pieces) > 3
    assert [model.model for model in ollama_client.list().models] == ["demo"]


def test_ollamas_options_reach_the_sampler(ollama_client):
    prompt = "The capital of France is"
    short = ollama_client.generate("demo", prompt, options={"num_predict": 2, "temperature": 0})
    assert short.eval_count == 2
    assert (
        ollama_client.chat("demo", messages=QUESTION, options={"num_predict": -1}).message.content == ANSWER
    )


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_curl(demo):
    body = json.dumps({"model": "demo", "messages": QUESTION, "max_tokens": 40})
    done = subprocess.run(
        ["curl", "-s", f"{demo.url}/v1/chat/completions", "-H", "Content-Type: application/json", "-d", body],
        capture_output=True,
        text=True,
    )
    assert json.loads(done.stdout)["choices"][0]["message"]["content"] == ANSWER


def test_examples_of_the_documentation_run(demo):
    page = Path(__file__).resolve().parents[2] / "doc/clients.md"
    examples = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    assert len(examples) == 2
    for example in examples:
        program = example.replace("http://127.0.0.1:30000", demo.url)
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert done.stdout == f"{ANSWER}\n", done.stderr


def test_metrics_for_prometheus(demo):
    text = requests.get(f"{demo.url}/metrics", timeout=60).text
    assert "sglang:generation_tokens_total" in text


@pytest.mark.parametrize("action", ["start", "stop", "dump"])
def test_recording_without_its_flag_is_refused(demo, action):
    """Before, all three answered 200, and nothing was written."""
    answer = requests.post(f"{demo.url}/{action}_expert_distribution_record", timeout=60)
    assert answer.status_code == 400
    assert "start the server with --record-kt-gpu-expert-distribution" in answer.text
