"""Risk: a checkpoint leads to other files, waits for ever, ends the process, or means two things at once."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import struct
from collections import Counter
from pathlib import Path

import pytest
import torch
from api_support import (
    EXPERTS,
    HIDDEN,
    INTERMEDIATE,
    make_wrapper,
    qwen_tensors,
    random_experts,
    save_sharded,
    save_single,
)
from isolation import isolated

from kt_kernel.checkpoint.mapped_file import MappedFiles
from kt_kernel.checkpoint.reader import open_checkpoint
from kt_kernel.checkpoint.sources import SafetensorsExperts
from kt_kernel.errors import CheckpointError, KTError

SIZES = {"num_experts": EXPERTS, "hidden": HIDDEN, "intermediate": INTERMEDIATE}
INDEX = "model.safetensors.index.json"


def _write_index(folder: Path, file_name: str) -> Path:
    folder.mkdir()
    (folder / INDEX).write_text(
        json.dumps({"weight_map": {"model.layers.0.mlp.experts.0.up_proj.weight": file_name}})
    )
    return folder


@pytest.mark.parametrize("where", ["../outside.safetensors", "a/../../outside.safetensors", "absolute"])
def test_an_index_leads_nowhere_outside_its_directory(tmp_path, where):
    outside = tmp_path / "outside.safetensors"
    save_single(tmp_path / "saved", qwen_tensors(random_experts(seed=1)))
    next((tmp_path / "saved").glob("*.safetensors")).rename(outside)
    folder = _write_index(tmp_path / "model", str(outside) if where == "absolute" else where)
    with pytest.raises(CheckpointError, match=r"outside\.safetensors', which is not in its directory"):
        open_checkpoint(folder)


def test_an_index_may_name_files_in_folders_below(tmp_path):
    folder = save_sharded(tmp_path / "model", qwen_tensors(random_experts(seed=1)))
    index = json.loads((folder / INDEX).read_text())
    (folder / "part").mkdir()
    for name in set(index["weight_map"].values()):
        (folder / name).rename(folder / "part" / name)
    index["weight_map"] = {name: f"part/{file}" for name, file in index["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(index))
    make_wrapper(weight_path=str(folder)).load_weights()


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_weights_are_in_plain_files(tmp_path, kind):
    """A pipe that nobody writes into would be waited for."""
    path = tmp_path / "model.safetensors"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match=rf"model.safetensors' is no plain file but a {kind}"):
        open_checkpoint(tmp_path)


def _write_header(path: Path, header: str, data_bytes: int) -> Path:
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + bytes(data_bytes))
    return path


def _entry(name: str, begin: int, end: int) -> str:
    return f'"{name}": {{"dtype": "U8", "shape": [{end - begin}], "data_offsets": [{begin}, {end}]}}'


@pytest.mark.parametrize(
    ("entries", "sentence"),
    [
        ([_entry("a", 0, 8), _entry("a", 8, 16)], "'a' is in it twice"),
        ([_entry("a", 0, 8), _entry("b", 7, 16)], "tensor 'b' begins at byte .*, inside tensor 'a'"),
        ([_entry("b", 0, 16), _entry("a", 4, 8)], "tensor 'a' begins at byte .*, inside tensor 'b'"),
    ],
)
def test_a_byte_belongs_to_one_tensor_and_a_name_to_one_place(tmp_path, entries, sentence):
    path = _write_header(tmp_path / "model.safetensors", "{" + ", ".join(entries) + "}", 16)
    with pytest.raises(CheckpointError, match=sentence):
        open_checkpoint(path)


def test_empty_tensors_lie_where_others_begin_and_end(tmp_path):
    entries = [_entry("a", 0, 8), _entry("empty", 8, 8), _entry("first", 0, 0), _entry("b", 8, 16)]
    path = _write_header(tmp_path / "model.safetensors", "{" + ", ".join(entries) + "}", 16)
    assert len(open_checkpoint(path)) == 4


def test_an_index_that_names_a_tensor_twice_is_damaged(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / INDEX).write_text('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}')
    with pytest.raises(CheckpointError, match="'a' is in it twice"):
        open_checkpoint(folder)


def cut_off_while_it_is_packed(folder: str) -> None:
    """The file loses its second half when the threads that pack are about to read it."""
    path = Path(folder) / "model.safetensors"
    will_need = MappedFiles.will_need

    def cut_then(files, names) -> None:
        will_need(files, names)
        os.truncate(path, path.stat().st_size // 2)

    MappedFiles.will_need = cut_then
    wrapper = make_wrapper(weight_path=folder)
    with pytest.raises(CheckpointError, match=r"was cut off while it was read: it has .* bytes, and had"):
        wrapper.load_weights()
    MappedFiles.will_need = will_need
    save_single(Path(folder), qwen_tensors(random_experts(seed=1)))
    wrapper.load_weights()
    hidden, ids = torch.ones(1, HIDDEN), torch.zeros(1, wrapper.num_experts_per_tok, dtype=torch.int64)
    assert wrapper.forward(hidden, ids, torch.ones(ids.shape)).isfinite().all()


def test_a_file_that_is_cut_off_while_it_is_packed_is_an_error_and_no_crash(tmp_path):
    folder = save_single(tmp_path / "model", qwen_tensors(random_experts(seed=1)))
    here = Path(__file__).parent
    isolated(Path(__file__).stem, cut_off_while_it_is_packed.__name__, str(folder), PYTHONPATH=str(here))


_WORDS = ("null", "-1", "1e400", "[]", "{}", '"\\u0000"', "true", "NaN", '"../x"', "[" * 2000, '{"a": 1}')


def _damaged(text: str, choices: random.Random) -> str:
    """A value replaced, a piece cut out, doubled, or a character changed."""
    begin = choices.randrange(len(text))
    end = min(len(text), begin + choices.randrange(1, 40))
    kind = choices.randrange(4)
    if kind == 0:
        values = list(re.finditer(r'(?<=:) ?("[^"]*"|[\w.]+|\[[^]]*\])', text))
        value = choices.choice(values)
        return text[: value.start()] + choices.choice(_WORDS) + text[value.end() :]
    if kind == 1:
        return text[:begin] + text[end:]
    if kind == 2:
        return text[:end] + text[begin:]
    return text[:begin] + chr(choices.randrange(1, 0x500)) + text[begin + 1 :]


@pytest.mark.parametrize("name", [INDEX, "config.json", "model-00001-of-00003.safetensors"])
def test_damaged_descriptions_are_read_or_refused_with_a_sentence(tmp_path, name):
    """A failure's seed is in its message: the same damage again by random.Random(seed)."""
    folder = save_sharded(tmp_path / "model", qwen_tensors(random_experts(seed=1)))
    path = folder / name
    config = {
        "model_type": "qwen3_moe",
        "hidden_size": HIDDEN,
        "quantization_config": {"bits": 4, "group_size": 32},
    }
    (folder / "config.json").write_text(json.dumps(config))
    original = path.read_bytes()
    # Of weights, the header, whose length stays right.
    first, last = (
        (8, 8 + struct.unpack_from("<Q", original)[0]) if name.endswith("safetensors") else (0, len(original))
    )
    outcomes = Counter[str]()
    for seed in range(300):
        text = _damaged(original[first:last].decode(), random.Random(seed)).encode()
        head = struct.pack("<Q", len(text)) if first else b""
        path.write_bytes(head + text + original[last:])
        os.utime(path, ns=(seed + 1, seed + 1))  # readers are kept as long as files look the same
        try:
            source = SafetensorsExperts(open_checkpoint(folder))
            with source.layer(0, source.method(), **SIZES):
                pass
            outcomes["read"] += 1
        except KTError as error:
            assert "\n" not in str(error), f"seed {seed}"
            outcomes["refused"] += 1
        except Exception as error:
            pytest.fail(f"seed {seed}: {type(error).__name__}: {error}")
    assert outcomes["refused"] > 20, outcomes


def test_a_disk_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    folder = save_single(tmp_path / "model", qwen_tensors(random_experts(seed=1)))

    def broken(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("kt_kernel.checkpoint.mapped_file.mmap.mmap", broken)
    with pytest.raises(CheckpointError, match=r"model\.safetensors' cannot be read: Input/output error"):
        make_wrapper(weight_path=str(folder)).load_weights()
