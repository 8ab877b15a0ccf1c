"""What a user can get wrong on the command line: one sentence, before anything is started."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_quantised
import torch
from server import Server, clean_environment, free_port, kt_options

ACCEPTED = {
    "experts on the device": ["--kt-num-gpu-experts", "4"],
    "no expert count": ["--kt-cpuinfer", "2"],
    "share of the experts": ["--kt-gpu-experts-ratio", "0.5", "--kt-expert-placement-strategy", "random"],
    "front-loading": ["--kt-gpu-experts-ratio", "0.3", "--kt-expert-placement-strategy", "front-loading"],
    "activations": ["--kt-activations", "bf16"],
    "deferral": ["--kt-max-deferred-experts-per-token", "2"],
    "numa nodes": ["--kt-threadpool-count", "1", "--kt-numa-nodes", "0"],
    "the checkpoint's own method": ["--kt-method", "AUTO"],
    "no prefill on the device": ["--kt-gpu-prefill-token-threshold", "0"],
    "prefill on the device": ["--kt-gpu-prefill-token-threshold", "4096", "--chunked-prefill-size", "4096"],
    "prefill on the device in another format": [
        *("--kt-gpu-prefill-token-threshold", "400", "--quantization", "fp8"),
    ],
    "update after prefill": [
        *("--kt-num-gpu-experts", "4", "--kt-gpu-prefill-token-threshold", "400"),
        "--kt-enable-dynamic-expert-update",
    ],
    "update at intervals": [
        *("--kt-num-gpu-experts", "4", "--kt-expert-update-interval", "8"),
        "--kt-enable-dynamic-expert-update",
    ],
    "fetching misses": ["--kt-miss-policy", "auto"],
    "statistics": [
        *("--kt-num-gpu-experts", "4", "--kt-expert-placement-strategy", "frequency"),
        *("--init-expert-location", "{counts}"),
    ],
    "recording": ["--record-kt-gpu-expert-distribution"],
    "two ranks": ["--tp-size", "2", "--kt-num-gpu-experts", "4"],
}

REFUSED = {
    "unknown method": (["--kt-method", "int4"], "method 'int4' is unknown"),
    "another method": (["--kt-method", "FP8"], "holds BF16 experts; give --kt-method BF16"),
    "activations without kernels": (
        ["--kt-activations", "int8"],
        "--kt-activations is int8, but method BF16 has no kernels for them",
    ),
    "zero threads": (["--kt-cpuinfer", "0"], "--kt-cpuinfer is 0, expected at least 1"),
    "absent node": (["--kt-numa-nodes", "63"], "--kt-numa-nodes names node 63"),
    "too many experts": (["--kt-num-gpu-experts", "17"], "a layer of this model has 16 experts"),
    "no chunks": (["--chunked-prefill-size", "-1"], "--chunked-prefill-size is -1"),
    "share above one": (["--kt-gpu-experts-ratio", "1.5"], "--kt-gpu-experts-ratio is 1.5, expected"),
    "negative share": (["--kt-gpu-experts-ratio", "-0.1"], "--kt-gpu-experts-ratio is -0.1, expected"),
    "update without an occasion": (
        ["--kt-enable-dynamic-expert-update"],
        "without an occasion to move experts; add --kt-expert-update-interval",
    ),
    "interval without update": (
        ["--kt-expert-update-interval", "8"],
        "--kt-expert-update-interval is 8 without --kt-enable-dynamic-expert-update",
    ),
    "device prefill without chunks": (
        ["--kt-gpu-prefill-token-threshold", "400", "--chunked-prefill-size", "-1"],
        "--chunked-prefill-size is -1",
    ),
    "threshold that no chunk reaches": (
        ["--kt-gpu-prefill-token-threshold", "513", "--chunked-prefill-size", "512"],
        "--kt-gpu-prefill-token-threshold is 513, but no chunk has more than the 512 tokens",
    ),
    "negative threshold": (["--kt-gpu-prefill-token-threshold", "-1"], "expected at least 0"),
    "frequency without statistics": (
        ["--kt-expert-placement-strategy", "frequency"],
        "frequency needs counts of an earlier run; name their file with --init-expert-location",
    ),
    "missing statistics": (
        ["--kt-expert-placement-strategy", "frequency", "--init-expert-location", "{folder}/none.pt"],
        "none.pt do not exist",
    ),
    "statistics of another kind": (
        ["--kt-expert-placement-strategy", "frequency", "--init-expert-location", "{folder}/counts.csv"],
        "expected one of .pt, .json, .npy",
    ),
    "statistics of another model": (
        ["--kt-expert-placement-strategy", "frequency", "--init-expert-location", "{others}"],
        "have shape [4, 8] (layers, experts), but the model has [4, 16]",
    ),
    "statistics without frequency": (
        ["--init-expert-location", "{counts}"],
        "counts.pt is read by --kt-expert-placement-strategy frequency, but the strategy is uniform",
    ),
    "device format and update": (
        [
            *("--kt-enable-dynamic-expert-update", "--kt-gpu-prefill-token-threshold", "400"),
            *("--quantization", "fp8"),
        ],
        "for a model that is fp8 on the device with BF16 experts on the CPU",
    ),
    "compiled layers": (
        ["--enable-torch-compile"],
        "not available yet: --enable-torch-compile together with",
    ),
    "graphs in pieces": (
        ["--cuda-graph-backend-decode", "breakable"],
        "not available yet: --cuda-graph-backend-decode breakable together with --kt-weight-path",
    ),
    "graphs of prompts": (
        ["--cuda-graph-backend-prefill", "breakable"],
        "not available yet: graphs of prompts (prefill backend breakable) together with --kt-weight-path",
    ),
    "device kernels": (
        ["--moe-runner-backend", "triton_kernel"],
        "not available yet: --moe-runner-backend triton_kernel together with --kt-weight-path",
    ),
    "adapter": (["--kt-expert-lora-path", "adapter"], "there is no adapter_config.json in 'adapter'"),
    "adapter and moving experts": (
        ["--kt-lora-path", "adapter", "--kt-num-gpu-experts", "2", "--kt-gpu-prefill-token-threshold", "64"],
        "not available yet: --kt-expert-lora-path together with options that copy experts to the device",
    ),
    "paged experts": (["--enable-paged-experts"], "not available yet: --enable-paged-experts together with"),
    "redundant experts": (
        ["--ep-num-redundant-experts", "2"],
        "not available yet: --ep-num-redundant-experts 2",
    ),
}


def configure(*servers: list[str]) -> list[str]:
    """What comes of each argument list: "accepted", or the message the process would end with."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("configure_servers.py"))],
        input=json.dumps(servers),
        env={**clean_environment(), "KT_SGLANG_CPU_SHIMS": "1"},
        capture_output=True,
        text=True,
        timeout=480,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == len(servers), done.stderr[-2000:]
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def model(tiny_checkpoint) -> Path:
    return tiny_checkpoint("qwen3_moe")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """What the rows above name in braces."""
    folder = tmp_path_factory.mktemp("statistics")
    for name, experts in (("counts", 16), ("others", 8)):
        torch.save({"logical_count": torch.ones(2, 4, experts)}, folder / f"{name}.pt")
    (folder / "counts.csv").write_text("1,2\n")
    return {"folder": folder, "counts": folder / "counts.pt", "others": folder / "others.pt"}


def test_flags_are_accepted_or_refused_with_a_sentence(model, files):
    common = [
        "--model",
        str(model),
        "--port",
        str(free_port()),
        "--kt-weight-path",
        str(model),
        "--kt-method",
        "BF16",
    ]
    cases = {**{name: (options, "accepted") for name, options in ACCEPTED.items()}, **REFUSED}
    outcomes = configure(
        *(common + [option.format(**files) for option in options] for options, _ in cases.values())
    )
    for (name, (_, expected)), outcome in zip(cases.items(), outcomes, strict=True):
        assert expected in outcome, f"{name}: {outcome}"
        assert outcome == "accepted" or outcome.startswith("error: "), f"{name}: {outcome}"
        assert "\n" not in outcome, name


def test_paths_and_ports_are_looked_at_first(model, tmp_path):
    (tmp_path / "empty").mkdir()
    port = str(free_port())
    weights = ["--kt-weight-path", str(model), "--kt-method", "BF16"]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        outcomes = configure(
            ["--model", str(tmp_path / "empty"), "--port", port, *weights],
            ["--model", str(tmp_path / "nothing"), "--port", port, *weights],
            ["--model", str(model), "--port", port, "--kt-weight-path", str(tmp_path / "nothing")],
            ["--model", str(model), "--port", str(taken.getsockname()[1]), *weights],
            ["--model", str(model), "--port", port, "--kt-num-gpu-experts", "4"],
            ["--model", str(model), "--port", port],
        )
    for outcome, part in zip(
        outcomes,
        (
            "has no config.json",
            "does not exist",
            "--kt-weight-path",
            "cannot listen",
            "without --kt-weight-path",
            "accepted",
        ),
        strict=True,
    ):
        assert part in outcome


def test_quantised_checkpoints_are_looked_at_first(tmp_path):
    gptq = tiny_quantised.build("qwen3-gptq-int4", tmp_path / "gptq") / "served"
    fp8 = tiny_quantised.build("deepseek-v3", tmp_path / "fp8") / "served"
    biased = tiny_quantised.build("gpt-oss", tmp_path / "gpt-oss") / "served"

    def changed(model: Path, **changes: object) -> Path:
        path = tmp_path / "-".join((model.parent.name, *changes))
        shutil.copytree(model, path)
        config = json.loads((path / "config.json").read_text())
        config["quantization_config"].update(changes)
        (path / "config.json").write_text(json.dumps(config))
        return path

    reordered = changed(gptq, desc_act=True)
    cases = [
        (gptq, gptq, [], "accepted"),
        (biased, biased, ["--kt-num-gpu-experts", "4"], "accepted"),
        (
            *(biased, biased, ["--kt-gpu-prefill-token-threshold", "64"]),
            "have biases, and such experts are not copied to a device; leave out --kt-gpu-prefill",
        ),
        (gptq, gptq, ["--kt-method", "RAWINT4"], "holds GPTQ_INT4 experts; give --kt-method GPTQ_INT4"),
        (reordered, reordered, [], "desc_act=false"),
        (reordered, gptq, [], "is quantised with desc_act=true, expected desc_act=false"),
        (changed(fp8, weight_block_size=[64, 64]), fp8, [], "expected weight_block_size=[128, 128]"),
    ]
    common = ["--port", str(free_port())]
    outcomes = configure(
        *(
            [*common, "--model", str(model), "--kt-weight-path", str(weights), *options]
            for model, weights, options, _ in cases
        )
    )
    for (model, _, _, part), outcome in zip(cases, outcomes, strict=True):
        assert part in outcome, f"{model}: {outcome}"
        assert outcome == "accepted" or outcome.startswith("error: "), outcome
        assert "\n" not in outcome


def test_weights_that_do_not_fit_end_the_server_with_a_sentence(model, tiny_checkpoint, tmp_path):
    """Found while loading, in a child process: Mixtral's experts under a Qwen3 model."""
    server = Server(model, tmp_path / "log", kt_options(tiny_checkpoint("mixtral")))
    try:
        assert server.wait_until_gone(120) != 0
        errors = [line for line in server.log_text().splitlines() if "error: " in line]
        assert len(errors) == 1, server.log_tail()
        assert "num_experts is 16" in errors[0] and "holds 8 experts" in errors[0]
        assert "Traceback" not in server.log_text()
    finally:
        server.stop()
