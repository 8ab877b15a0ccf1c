"""Risk: what cannot be converted ends in a traceback, half an answer, or files that look whole."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import checkpoints
import pytest
import torch
from checkpoints import write_checkpoint
from safetensors.torch import load_file, save_file

from kt_kernel.convert import job
from kt_kernel.convert.job import Conversion, convert
from kt_kernel.convert.targets import target
from kt_kernel.errors import KTError

LAYER_2 = "model-00002.safetensors"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "in", checkpoints.stored_bf16)
    return tmp_path / "in"


def sentence(source: Path, output: Path, method: str = "int8", group_size: int = 0, **said: str) -> str:
    """What the conversion says; nothing of it may look like a finished file."""
    finished = {path.name for path in output.glob("model-layer-*")} if output.exists() else set()
    with pytest.raises(KTError) as error:
        convert(Conversion(source, output, target(method, group_size), 2, **said))
    text = str(error.value)
    assert "\n" not in text and text.endswith("."), text
    if output.exists():
        assert not list(output.glob(".*")), "an unfinished file was left behind"
        manifest = output / "kt_manifest.json"
        if manifest.exists() and not finished:
            assert json.loads(manifest.read_text())["complete"] is False
    return text


def rewrite(file: Path, change) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def test_missing_shard(source, tmp_path):
    (source / LAYER_2).unlink()
    assert LAYER_2 in sentence(source, tmp_path / "out")


def test_truncated_shard(source, tmp_path):
    with (source / LAYER_2).open("r+b") as file:
        file.truncate(os.path.getsize(source / LAYER_2) - 1)
    text = sentence(source, tmp_path / "out")
    assert "is cut off" in text and LAYER_2 in text


def test_missing_tensor(source, tmp_path):
    name = "model.layers.2.mlp.experts.1.up_proj.weight"
    rewrite(source / LAYER_2, lambda tensors: tensors.pop(name))
    assert name in sentence(source, tmp_path / "out")


def test_missing_last_expert(source, tmp_path):
    def drop(tensors):
        for name in [name for name in tensors if ".experts.2." in name]:
            del tensors[name]

    rewrite(source / LAYER_2, drop)
    (source / "model.safetensors.index.json").unlink()
    text = sentence(source, tmp_path / "out")
    assert "num_experts is 3" in text and "2 experts" in text


@pytest.mark.parametrize(
    ("replacement", "said"),
    [
        (torch.zeros(384, 256, dtype=torch.int64), "I64"),
        (torch.zeros(384, 256, dtype=torch.float64), "F64"),
        (torch.zeros(384, 255, dtype=torch.bfloat16), "[384, 255]"),
        (torch.zeros((), dtype=torch.bfloat16), "[]"),
    ],
)
@pytest.mark.parametrize("expert", [0, 1])
def test_wrong_dtype_or_shape(source, tmp_path, replacement, said, expert):
    name = f"model.layers.2.mlp.experts.{expert}.gate_proj.weight"
    rewrite(source / LAYER_2, lambda tensors: tensors.update({name: replacement}))
    text = sentence(source, tmp_path / "out")
    assert said in text and "model.layers.2.mlp.experts" in text, text


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(source, tmp_path, value):
    name = "model.layers.2.mlp.experts.1.down_proj.weight"

    def spoil(tensors):
        tensors[name][17, 3] = value

    rewrite(source / LAYER_2, spoil)
    text = sentence(source, tmp_path / "out")
    assert name in text and "row 17" in text


@pytest.mark.parametrize("kind", checkpoints.FORMATS)
def test_biases_are_not_lost(tmp_path, kind):
    """Those of zeros, which GPTQ's tools write, change nothing."""
    source = tmp_path / "in"
    checkpoints.write_format(source, kind)
    (source / "model.safetensors.index.json").unlink()
    name = "model.layers.2.mlp.experts.1.down_proj.bias"
    rewrite(source / LAYER_2, lambda tensors: tensors.update({name: torch.ones(256, dtype=torch.float16)}))
    text = sentence(source, tmp_path / "out")
    assert name in text and "holds a bias" in text
    rewrite(source / LAYER_2, lambda tensors: tensors[name].zero_())
    assert convert(Conversion(source, tmp_path / "out", target("int8", 0), 2)).converted == 2


@pytest.mark.parametrize("name", ["gate_up_proj_bias", "gate_up_proj.bias", "down_proj_bias"])
def test_biases_of_packed_experts_are_not_lost(tmp_path, name):
    checkpoints.write_packed(tmp_path / "in", torch.bfloat16, inputs_are_rows=False)
    name = f"model.layers.0.mlp.experts.{name}"
    rewrite(tmp_path / "in" / "model.safetensors", lambda tensors: tensors.update({name: torch.ones(3, 8)}))
    text = sentence(tmp_path / "in", tmp_path / "out")
    assert name in text and "holds a bias" in text


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        (
            {
                "mlp.experts.gate_up_proj_blocks": torch.zeros(2, 64, 1, 16, dtype=torch.uint8),
                "mlp.experts.gate_up_proj_scales": torch.zeros(2, 64, 1, dtype=torch.uint8),
                "mlp.experts.gate_up_proj_bias": torch.zeros(2, 64),
                "mlp.experts.down_proj_blocks": torch.zeros(2, 32, 1, 16, dtype=torch.uint8),
                "mlp.experts.down_proj_scales": torch.zeros(2, 32, 1, dtype=torch.uint8),
            },
            "gate_up_proj_blocks",
        ),
        (
            {f"moe.{name}_proj.weight": torch.zeros(2, 32, 32).bfloat16() for name in ("gate", "up", "down")},
            "gate of all experts in one tensor and up in another",
        ),
    ],
    ids=["gpt-oss", "Step-3.5"],
)
def test_packed_experts_that_are_not_converted(tmp_path, tensors, said):
    """They are whole: nothing may be said to be missing."""
    (tmp_path / "in").mkdir()
    named = {f"model.layers.0.{name}": tensor for name, tensor in tensors.items()}
    save_file(named, tmp_path / "in/model.safetensors")
    text = sentence(tmp_path / "in", tmp_path / "out")
    assert said in text and text.endswith("load the checkpoint as it is."), text


def test_rows_of_gate_and_up_in_turn(tmp_path):
    """gpt-oss's order, told by its biases: halves would mix gate and up."""
    checkpoints.write_packed(tmp_path / "in", torch.bfloat16, inputs_are_rows=False)
    name = "model.layers.0.mlp.experts.gate_up_proj_bias"
    rewrite(tmp_path / "in" / "model.safetensors", lambda tensors: tensors.update({name: torch.zeros(4, 8)}))
    assert "rows of gate and up in turn" in sentence(tmp_path / "in", tmp_path / "out")


def test_group_numbers_that_do_not_exist(tmp_path):
    config = {"quantization_config": checkpoints.QUANTISED_CONFIG["gptq-order"]}
    write_checkpoint(tmp_path / "in", checkpoints.stored_gptq_order, config=config)
    name = "model.layers.2.mlp.experts.1.up_proj.g_idx"

    def spoil(tensors):
        tensors[name][5] = 2

    rewrite(tmp_path / "in" / LAYER_2, spoil)
    text = sentence(tmp_path / "in", tmp_path / "out")
    assert name in text and "0 to 1" in text


@pytest.mark.parametrize(("key", "value"), [("bits", 8), ("version", "gemv")])
def test_awq_of_another_kind(tmp_path, key, value):
    said = {**checkpoints.QUANTISED_CONFIG["awq"], key: value}
    write_checkpoint(tmp_path / "in", checkpoints.stored_awq, config={"quantization_config": said})
    assert f"{key}={value!r}" in sentence(tmp_path / "in", tmp_path / "out")


def test_no_experts_at_all(tmp_path):
    (tmp_path / "in").mkdir()
    save_file({"model.layers.0.mlp.up_proj.weight": torch.zeros(8, 8)}, tmp_path / "in/model.safetensors")
    assert "no routed experts" in sentence(tmp_path / "in", tmp_path / "out")


def test_nothing_there(tmp_path):
    assert "does not exist" in sentence(tmp_path / "in", tmp_path / "out")


def test_groups_that_do_not_divide(tmp_path):
    write_checkpoint(tmp_path / "in", checkpoints.stored_bf16)
    file = tmp_path / "in" / LAYER_2

    def narrow(tensors):
        for name in [name for name in tensors if ".experts." in name]:
            tensors[name] = (tensors[name][:, :96] if "down" in name else tensors[name][:96]).clone()

    rewrite(file, narrow)
    text = sentence(tmp_path / "in", tmp_path / "out", group_size=64)
    assert "the intermediate size of layer 2 is 96" in text and "0, 32" in text


def test_input_type_is_checked(source, tmp_path):
    text = sentence(source, tmp_path / "out", input_type="fp8")
    assert "--input-type is fp8" in text and "BF16" in text


def test_no_threads(source, tmp_path):
    with pytest.raises(KTError, match="expected at least 1"):
        convert(Conversion(source, tmp_path / "out", target("int8"), threads=-2))


def test_output_is_the_input(source, tmp_path):
    before = sorted(source.iterdir())
    (tmp_path / "link").symlink_to(source)
    for output in (source, tmp_path / "link", source / "inside"):
        assert "never touched" in sentence(source, output)
    assert sorted(source.iterdir()) == before


def test_output_holds_something_else(source, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "thesis.txt").write_text("mine")
    assert "thesis.txt" in sentence(source, output)
    assert (output / "thesis.txt").read_text() == "mine"


def test_what_was_converted_already(source, tmp_path):
    convert(Conversion(source, tmp_path / "once", target("int8"), 1))
    assert "holds AMXINT8 already" in sentence(tmp_path / "once", tmp_path / "twice")
    name = "blk.1.ffn_up_exps.0.numa.0"
    old = {f"{name}.weight": torch.zeros(8192, dtype=torch.int8), f"{name}.scale": torch.zeros(32)}
    (tmp_path / "old").mkdir()
    save_file(old, tmp_path / "old/model.safetensors")
    assert "integers for NUMA nodes already" in sentence(tmp_path / "old", tmp_path / "twice")


@pytest.mark.parametrize(("method", "group_size"), [("int4", 0), ("int8", 32)])
def test_output_holds_another_method(source, tmp_path, method, group_size):
    convert(Conversion(source, tmp_path / "out", target("int8", 0), 1))
    text = sentence(source, tmp_path / "out", method, group_size)
    assert "choose another output folder" in text


def test_output_holds_another_model(source, tmp_path):
    convert(Conversion(source, tmp_path / "out", target("int8", 0), 1))
    write_checkpoint(tmp_path / "larger", checkpoints.stored_bf16, layers=(1, 2, 3))
    assert "another model ('in', and this is 'larger')" in sentence(tmp_path / "larger", tmp_path / "out")


def test_output_shard_was_cut_off(source, tmp_path):
    convert(Conversion(source, tmp_path / "out", target("int8", 0), 1))
    with (tmp_path / "out/model-layer-00002.safetensors").open("r+b") as file:
        file.truncate(100_000)
    assert "has 100000 bytes" in sentence(source, tmp_path / "out")


def test_two_conversions_at_once(source, tmp_path):
    from kt_kernel.convert.manifest import locked

    with locked(tmp_path / "out"):
        assert "another conversion" in sentence(source, tmp_path / "out")


def test_a_full_disk_is_seen_before_anything_is_written(source, tmp_path, monkeypatch):
    class Full:
        f_bavail, f_frsize = 10, 4096

    monkeypatch.setattr(job.os, "statvfs", lambda path: Full)
    text = sentence(source, tmp_path / "out")
    assert "0.00 GB free" in text
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["kt_manifest.json"]


def test_a_write_that_fails_midway_can_be_continued(source, tmp_path):
    """The limit on a file's size stands for a disk that filled up in the meantime."""
    program = (
        "import resource, signal, sys; from kt_kernel.convert.settings import main;"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, {resource.RLIM_INFINITY})); sys.exit(main())"
    )
    options = ["-i", source, "-o", tmp_path / "out", "--quant-method", "int8"]
    failed = subprocess.run([sys.executable, "-c", program, *options], capture_output=True, text=True)
    assert failed.returncode == 1
    last = failed.stderr.splitlines()[-1]
    assert last.startswith("error: ") and "cannot be written" in last and "Traceback" not in failed.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["kt_manifest.json"]
    assert convert(Conversion(source, tmp_path / "out", target("int8", 0), 1)).converted == 2


@pytest.mark.parametrize(("method", "group_size"), [("int5", 0), ("awq", 0), ("int8", 48)])
def test_unknown_methods_and_groups(method, group_size):
    with pytest.raises(KTError, match="expected"):
        target(method, group_size)
