"""A conversation with a trained model, in this process."""

from __future__ import annotations

from typing import Any

import typer

from kt_kernel.cli.sft.run import check_adapter, load_run
from kt_kernel.cli.sft.settings import read_run


def talk(path: str, max_tokens: int) -> None:
    """Read lines until an empty one or the end of the input, and answer each."""
    run = read_run(path)
    check_adapter(run)
    base, tokenizer = load_run(run)
    from transformers import TextStreamer

    from kt_kernel.training import load_adapter

    model = load_adapter(base, run.adapter)
    messages: list[dict[str, str]] = []
    while said := _line():
        messages.append({"role": "user", "content": said})
        inputs = _inputs(tokenizer, messages).to(model.device)
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        out = model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False, streamer=streamer)
        answer = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        messages.append({"role": "assistant", "content": answer})


def _inputs(tokenizer: Any, messages: list[dict[str, str]]) -> Any:
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    else:
        text = "\n".join(message["content"] for message in messages)
    return tokenizer(text, add_special_tokens=not tokenizer.chat_template, return_tensors="pt")


def _line() -> str:
    try:
        return typer.prompt("you", default="", show_default=False, prompt_suffix="> ")
    except typer.Abort:
        return ""
