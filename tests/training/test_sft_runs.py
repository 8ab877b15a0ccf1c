"""`kt sft`: from the file of a run to an adapter, the same when interrupted; sentences for what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from kt_kernel.cli.main import app
from kt_kernel.cli.sft.data import IGNORED, read_examples
from kt_kernel.cli.sft.schedule import Schedule
from kt_kernel.cli.sft.settings import read_run
from kt_kernel.errors import ConfigurationError

MESSAGES = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "first answer"},
    {"role": "user", "content": "and?"},
    {"role": "assistant", "content": "second"},
]


def write_run(folder: Path, model: Path, **train: object) -> Path:
    lines = [{"prompt": f"{n} and one is ", "completion": f"{n + 1}"} for n in range(6)]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    settings = {
        "model": str(model),
        "data": "data.jsonl",
        "output": str(train.pop("output", "out")),
        "threads": 2,
        "lora": {"r": 4, "dropout": 0.2, "target_modules": ["q_proj", "v_proj"]},
        "train": {"learning_rate": "1e-2", "batch_size": 1, "accumulate": 2, **train},
    }
    file = folder / f"run-{settings['output']}.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file


def kt(*arguments: object, answer: int = 0) -> str:
    result = CliRunner().invoke(app, ["sft", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == answer, result.output
    return result.output


def losses(folder: Path) -> list[str]:
    return (folder / "loss.csv").read_text().splitlines()


def test_a_run_writes_an_adapter_its_losses_and_a_checkpoint(tiny, tmp_path):
    run = write_run(tmp_path, tiny(), steps=6)
    assert "out/adapter" in kt("train", run)
    rows = losses(tmp_path / "out")
    assert rows[0] == "step,loss" and len(rows) == 7
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").exists()
    kt("export", run, "--to", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tiny())
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert not torch.equal(merged.get_parameter(name), plain.get_parameter(name))
    assert "another run" in kt("train", run, answer=1)


def test_a_resumed_run_is_the_uninterrupted_one(tiny, tmp_path):
    kt("train", write_run(tmp_path, tiny(), steps=6, output="whole"))
    half = write_run(tmp_path, tiny(), steps=6, save_every=3, output="half")
    import kt_kernel.cli.sft.loop as loop

    step, made = loop.Loop._step, []

    def interrupted(self, examples):
        if len(made) == 4:
            raise KeyboardInterrupt
        made.append(examples)
        return step(self, examples)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Loop, "_step", interrupted)
        assert CliRunner().invoke(app, ["sft", "train", str(half)]).exit_code != 0
    assert "add --resume" in kt("train", half, answer=1)
    other = half.with_name("other.yaml")
    other.write_text(half.read_text().replace("accumulate: 2", "accumulate: 1"))
    assert "its accumulate was 2, and is 1 now" in " ".join(kt("train", other, "--resume", answer=1).split())
    kt("train", half, "--resume")
    assert losses(tmp_path / "half") == losses(tmp_path / "whole")


def test_only_answers_are_learned(tiny, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny())
    (tmp_path / "data.jsonl").write_text(json.dumps({"messages": MESSAGES}))
    (example,) = read_examples(str(tmp_path / "data.jsonl"), tokenizer, 1000)
    learned = [token for token, label in zip(example.ids, example.labels, strict=True) if label != IGNORED]
    assert tokenizer.decode(learned) == "first answer<|im_end|>\nsecond<|im_end|>\n"
    assert tokenizer.decode(example.ids) == tokenizer.apply_chat_template(MESSAGES, tokenize=False)


def test_completions_and_texts_end(tiny, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny())
    file = tmp_path / "data.jsonl"
    file.write_text('{"prompt": "ab", "completion": "cd"}\n\n{"text": "ef"}\n')
    completion, text = read_examples(str(file), tokenizer, 1000)
    assert completion.labels == [IGNORED, IGNORED, *completion.ids[2:]]
    assert text.labels == text.ids and text.ids[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ('{"question": "?"}', "line 1"),
        ("nonsense", "line 1"),
        ('{"text": ["a", "b"]}', "line 1.*'text' is a list, expected a string"),
        ('{"prompt": "a long question", "completion": "x"}', "nothing|anything to learn"),
    ],
)
def test_data_that_is_none_is_refused(tiny, tmp_path, line, match):
    (tmp_path / "data.jsonl").write_text(line)
    tokenizer = AutoTokenizer.from_pretrained(tiny())
    with pytest.raises(ConfigurationError, match=match):
        read_examples(str(tmp_path / "data.jsonl"), tokenizer, 8)


@pytest.mark.parametrize(
    ("said", "match"),
    [
        ("model: demo\ndata: d\noutput: o\nlearning_rate: 1\n", "key 'learning_rate'"),
        ("model: demo\ndata: d\n", "no key 'output'"),
        ("model: demo\ndata: d\noutput: o\ntrain: {steps: many}\n", "steps is 'many', expected int"),
        ("model: demo\ndata: d\noutput: o\nlora: {target_modules: q_proj}\n", "list of names"),
        (
            "model: demo\ndata: d\noutput: o\ntrain: {batch_size: 0}\n",
            "batch_size is 0, expected a number from 1 up",
        ),
        ("model: demo\ndata: d\noutput: o\ntrain: {steps: -5}\n", "steps is -5"),
        ("model: demo\ndata: d\noutput: o\ntrain: {learning_rate: .nan}\n", "learning_rate is nan"),
        ("model: demo\ndata: d\noutput: o\nlora: {dropout: 1.0}\n", "dropout is 1.0"),
        ("[", "not YAML"),
    ],
)
def test_settings_that_do_not_belong_are_refused(tmp_path, said, match):
    (tmp_path / "run.yaml").write_text(said)
    with pytest.raises(ConfigurationError, match=match):
        read_run(str(tmp_path / "run.yaml"))


def test_the_rate_rises_and_falls():
    schedule = Schedule(peak=1.0, steps=100, warmup=0.1)
    rates = [schedule.rate(step) for step in range(100)]
    assert rates[9] == 1.0 == max(rates) and rates[0] == pytest.approx(0.1)
    assert rates[9:] == sorted(rates[9:], reverse=True) and rates[-1] < 0.001


def test_a_string_may_hold_what_ends_lines_elsewhere(tiny, tmp_path):
    (tmp_path / "data.jsonl").write_text('{"text": "one\u2028two\u0085three"}\n', encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(tiny())
    assert len(read_examples(str(tmp_path / "data.jsonl"), tokenizer, 1000)) == 1


def test_what_is_missing_is_told_before_the_model_is_loaded(tmp_path):
    run = write_run(tmp_path, Path("no-such-model"), steps=1)
    assert "leave --resume out" in kt("train", run, "--resume", answer=1)
    assert "train it with kt sft train" in " ".join(
        kt("export", run, "--to", tmp_path / "m", answer=1).split()
    )
    (tmp_path / "data.jsonl").unlink()
    assert "is no file" in " ".join(kt("train", run, answer=1).split())
