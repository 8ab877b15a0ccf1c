"""The reader of GGUF files: what a good file says is what is read, and each bad file is one sentence."""

import os
import struct
import tracemalloc

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGUFReader, GGUFWriter
from gguf_headers import (
    ALIGNMENT,
    ARRAY,
    F32,
    I32,
    STRING,
    U8,
    U32,
    U64,
    Header,
    Tensor,
    entry,
    part,
    string,
    usual,
)

from kt_kernel.errors import CheckpointError, CheckpointPathError, MissingTensorError
from kt_kernel.gguf.model import holds_gguf, open_gguf
from kt_kernel.gguf.types import TYPES


def _error(path, error=CheckpointError) -> str:
    with pytest.raises(error) as caught:
        open_gguf(path)
    message = str(caught.value)
    assert "\n" not in message
    return message


def _refused(path, error=CheckpointError) -> str:
    message = _error(path, error)
    assert os.path.basename(path) in message
    return message


def _refused_file(tmp_path, header: Header) -> str:
    return _refused(header.write(tmp_path / "model.gguf"))


# ---- good files ------------------------------------------------------------------------------------------


def test_every_field_of_a_file(tmp_path):
    model = open_gguf(usual().write(tmp_path / "model.gguf"))
    assert model.architecture == "qwen3moe"
    assert model.metadata["qwen3moe.block_count"] == 2
    assert model.metadata["qwen3moe.rope.freq_base"] == 10000.0
    assert model.metadata["tokenizer.ggml.add_bos_token"] is True
    assert model.metadata.get("absent") is None and "absent" not in model.metadata
    tokens = model.metadata["tokenizer.ggml.tokens"]
    assert tokens.tolist() == ["a", "ü", "", "longer token"] and len(tokens) == 4
    assert tokens[1] == "ü" and tokens[-1] == "longer token" and tokens[2:] == ["", "longer token"]
    assert model.metadata["tokenizer.ggml.token_type"].tolist() == [1, 2, -3, 4]
    assert model.metadata["tokenizer.ggml.token_type"][-2] == -3
    assert model.metadata["general.languages"].tolist() == []
    with pytest.raises(IndexError):
        tokens[4]
    assert list(model.tensors) == ["token_embd.weight", "output_norm.weight", "blk.0.ffn_up_exps.weight"]
    info = model.info("blk.0.ffn_up_exps.weight")
    assert (info.dtype, info.shape, info.bytes, info.stored_shape) == ("Q4_K", (3, 2, 256), 864, (3, 2, 144))
    view = model.view("token_embd.weight")
    assert view.dtype is torch.uint8 and view.flatten().tolist() == list(range(136))
    norm = model.view("output_norm.weight").view(torch.float32)
    assert norm.tolist() == list(range(8))
    with pytest.raises(MissingTensorError, match="'nothing' is not in"):
        model.view("nothing")


def test_a_view_is_the_mapping_itself(tmp_path):
    model = open_gguf(usual().write(tmp_path / "model.gguf"))
    file = model.files[0]
    begin = file.bytes.data_ptr()
    for name in model.tensors:
        assert begin <= model.view(name).data_ptr() < begin + file.size
    model.will_need(model.tensors)
    model.drop_pages(model.tensors)
    assert model.view("token_embd.weight").flatten()[5] == 5


@pytest.mark.parametrize("version", [2, 3])
def test_both_versions_are_read(tmp_path, version):
    header = usual()
    header.version = version
    assert open_gguf(header.write(tmp_path / "model.gguf")).files[0].version == version


def test_sizes_of_all_types_are_those_of_the_gguf_package():
    theirs = {row.name: (int(row), *size) for row, size in GGML_QUANT_SIZES.items()}
    ours = {row.name: (row.id, row.columns, row.bytes) for row in TYPES.values()}
    for of_activations in ("Q8_1", "Q8_K"):  # never in files, and gguf counts their sums otherwise
        assert theirs.pop(of_activations)[:2] == ours.pop(of_activations)[:2]
    assert ours == theirs


def test_what_the_gguf_package_writes_and_reads(tmp_path):
    writer = GGUFWriter(tmp_path / "model.gguf", "qwen3moe")
    for key, content in (("one", 1), ("half", 0.5), ("text", "größer"), ("yes", True)):
        {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, bool: writer.add_bool}[
            type(content)
        ](f"test.{key}", content)
    writer.add_array("test.integers", [1, -2, 3])
    writer.add_array("test.strings", ["a", "b"])
    numbers = np.random.default_rng(1)
    for name, dtype in (("a", np.float32), ("b", np.float16), ("c", np.float64), ("d", np.int8)):
        writer.add_tensor(name, (10 * numbers.standard_normal((3, 5, 7))).astype(dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model, theirs = open_gguf(tmp_path / "model.gguf"), GGUFReader(tmp_path / "model.gguf")
    for key, their in theirs.fields.items():
        if not key.startswith("GGUF."):
            ours = model.metadata[key]
            assert (ours if isinstance(ours, str | int | float) else ours.tolist()) == their.contents()
    assert list(model.tensors) == [tensor.name for tensor in theirs.tensors]
    for their in theirs.tensors:
        info = model.info(their.name)
        assert info.begin == their.data_offset and info.bytes == their.n_bytes
        assert info.dtype == their.tensor_type.name and info.shape == tuple(their.shape[::-1])
        assert model.view(their.name).numpy().tobytes() == their.data.tobytes()


def test_opening_does_not_decode_a_vocabulary(tmp_path):
    tokens = [f"token number {number}" for number in range(50_000)]
    header = usual()
    header.metadata.append(entry("tokens", ARRAY, (STRING, tokens)))
    path = header.write(tmp_path / "model.gguf")
    tracemalloc.start()
    model = open_gguf(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200_000
    assert model.metadata["tokens"].tolist() == tokens


def test_a_changed_file_is_read_again(tmp_path):
    header = usual()
    path = header.write(tmp_path / "model.gguf")
    first = open_gguf(path)
    assert open_gguf(path) is first
    header.metadata.append(entry("more", U32, 7))
    header.write(path)
    assert open_gguf(path).metadata["more"] == 7


# ---- bad files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "seen"),
    [
        (b"", "would end at byte 4 and the file has 0 bytes"),
        (b"GG", "would end at byte 4"),
        (b"PK\3\4" + bytes(100), "is no GGUF file: it begins with b'PK"),
        (b"tjgg" + bytes(100), "has the format ggjt, which GGUF has replaced"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "is big-endian GGUF"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "is GGUF version 1, expected 2 or 3"),
        (b"GGUF" + struct.pack("<IQQ", 4, 0, 0), "is GGUF version 4"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0), f"promises {1 << 60} tensors"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60), f"promises {1 << 60} metadata entries"),
    ],
)
def test_a_file_that_is_no_gguf(tmp_path, content, seen):
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    assert seen in _refused(path)


def test_a_file_cut_off_anywhere_is_refused(tmp_path):
    whole = usual().bytes()
    path = tmp_path / "model.gguf"
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        assert "cut off" in _refused(path)


@pytest.mark.parametrize(
    ("metadata", "seen"),
    [
        (entry(b"key \xff", U32, 1), "is not UTF-8 at its byte 4"),
        (entry("new\nline", U32, 1), "expected printable"),
        (entry("", U32, 1), "has 0 bytes, expected 1 to 65535"),
        (struct.pack("<Q", 1 << 40) + b"key", f"has {1 << 40} bytes"),
        (entry("general.architecture", U32, 1), "'general.architecture' is there twice"),
        (string("key") + struct.pack("<I", 99), "metadata 'key' has type 99"),
        (string("key") + struct.pack("<IIQ", ARRAY, 99, 0), "has elements of type 99"),
        (string("key") + struct.pack("<IIQ", ARRAY, ARRAY, 1), "arrays in an array"),
        (string("key") + struct.pack("<IIQ", ARRAY, STRING, 1 << 61), f"promises {1 << 61} strings"),
        (string("key") + struct.pack("<IIQ", ARRAY, U64, 1 << 61), "would end at byte"),
        (string("key") + struct.pack("<IIQQ", ARRAY, STRING, 2, 1 << 50), "would end at byte"),
        (string("key") + struct.pack("<IQ", STRING, 1 << 63), "would end at byte"),
    ],
)
def test_damaged_metadata(tmp_path, metadata, seen):
    header = usual()
    header.metadata.append(metadata)
    assert seen in _refused_file(tmp_path, header)


@pytest.mark.parametrize("key", ["text", "texts"])
def test_a_text_that_is_not_utf8_is_reported_when_read(tmp_path, key):
    header = usual()
    header.metadata += [
        entry("text", STRING, b"good \xff"),
        entry("texts", ARRAY, (STRING, ["good", b"\xc3"])),
    ]
    model = open_gguf(header.write(tmp_path / "model.gguf"))
    with pytest.raises(CheckpointError, match=f"metadata '{key}' is not UTF-8 at its byte"):
        list(model.metadata[key])


@pytest.mark.parametrize("said", [entry("general.alignment", kind, n) for kind, n in (
    (U32, 0), (U32, 24), (U32, 4), (U64, 1 << 40), (STRING, "32"), (F32, 32.0), (ARRAY, (U8, [32])),
)])  # fmt: skip
def test_an_impossible_alignment(tmp_path, said):
    header = usual()
    header.metadata[1] = said
    assert "general.alignment is" in _refused_file(tmp_path, header)


@pytest.mark.parametrize(
    ("tensor", "seen"),
    [
        (Tensor("x", (256,), 139, bytes(144)), "type IQ4_K of ik_llama.cpp (139)"),
        (Tensor("x", (256,), 144, bytes(144)), "type IQ4_KS of ik_llama.cpp (144)"),
        (Tensor("x", (256,), 31, bytes(144)), "type Q4_0_4_4 (31), which ggml has removed"),
        (Tensor("x", (256,), 1000, bytes(144)), "the unknown type 1000"),
        (Tensor("x", (128,), 12, bytes(144)), "is Q4_K of shape [128], expected a multiple of 256 columns"),
        (Tensor("x", (), 12, bytes(144)), "is Q4_K of shape []"),
        (Tensor("x", (1, 1, 1, 1, 1), 0, bytes(4)), "has 5 dimensions, expected at most 4"),
        (Tensor("x", (4, 0), 0, b""), "has shape [0, 4], expected extents of at least 1"),
        (Tensor("x", (8,), 0, bytes(32), offset=ALIGNMENT + 8), f"expected a multiple of {ALIGNMENT}"),
        (Tensor("x", (8,), 0, bytes(32), offset=0), "inside 'token_embd.weight', which ends at"),
        (Tensor("x", (8,), 0, bytes(32), offset=1 << 62), "ends at byte"),
        (Tensor("x", (1 << 40, 1 << 40, 1 << 40), 0, bytes(32)), "ends at byte"),
        (Tensor("output_norm.weight", (8,), 0, bytes(32)), "'output_norm.weight' is there twice"),
        (Tensor(b"\xff", (8,), 0, bytes(32)), "the name of a tensor is not UTF-8"),
        (Tensor("", (8,), 0, bytes(32)), "has 0 bytes"),
    ],
)
def test_damaged_tensors(tmp_path, tensor, seen):
    header = usual()
    header.tensors.append(tensor)
    assert seen in _refused_file(tmp_path, header)


def test_a_missing_path_and_a_missing_architecture(tmp_path):
    with pytest.raises(CheckpointPathError, match="does not exist"):
        open_gguf(tmp_path / "model.gguf")
    header = usual()
    for said, seen in ((entry("general.architecture", U32, 3), "is 3"), (entry("other", U32, 3), "is None")):
        header.metadata[0] = said
        model = open_gguf(header.write(tmp_path / "model.gguf"))
        with pytest.raises(CheckpointError, match=f"general.architecture {seen}"):
            _ = model.architecture


# ---- split models ----------------------------------------------------------------------------------------


def _tensor(number: int) -> Tensor:
    return Tensor(f"tensor.{number}", (8,), 0, struct.pack("<8f", *[number] * 8))


_ARCHITECTURE = entry("general.architecture", STRING, "qwen3moe")


def _split(directory, parts: int = 3, stem: str = "model"):
    paths = []
    for number in range(parts):
        more = [_ARCHITECTURE] if number == 0 else []
        header = part(number, parts, [_tensor(2 * number), _tensor(2 * number + 1)], 2 * parts, *more)
        paths.append(header.write(directory / f"{stem}-{number + 1:05}-of-{parts:05}.gguf"))
    return paths


@pytest.mark.parametrize("opened", [0, 1, 2, None])
def test_a_split_model_by_any_of_its_parts(tmp_path, opened):
    paths = _split(tmp_path)
    model = open_gguf(tmp_path if opened is None else paths[opened])
    assert model.architecture == "qwen3moe"
    assert len(model.files) == 3 and list(model.tensors) == [f"tensor.{number}" for number in range(6)]
    for number in range(6):
        assert model.view(f"tensor.{number}").view(torch.float32).tolist() == [number] * 8
    model.drop_pages(model.tensors)


def test_parts_that_are_links_to_other_names_as_in_the_hub_cache(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    for number, path in enumerate(_split(tmp_path)):
        path.rename(blobs / f"blob{number}")
        (snapshot / path.name).symlink_to(blobs / f"blob{number}")
    assert len(open_gguf(snapshot / "model-00002-of-00003.gguf").tensors) == 6
    assert len(open_gguf(snapshot).tensors) == 6


def test_a_missing_part(tmp_path):
    paths = _split(tmp_path)
    paths[1].unlink()
    message = _error(paths[0], CheckpointPathError)
    assert "model-00002-of-00003.gguf' does not exist, 1 of the model's 3 parts" in message
    assert "model-00002-of-00003.gguf" in _error(tmp_path, CheckpointPathError)


@pytest.mark.parametrize(
    ("wrong", "seen"),
    [
        (part(0, 3, [_tensor(2), _tensor(3)], 6), "split.no 0, expected 1"),
        (part(2, 3, [_tensor(2), _tensor(3)], 6), "split.no 2, expected 1"),
        (part(1, 2, [_tensor(2), _tensor(3)], 6), "split.count 2, expected 3"),
        (part(1, 3, [_tensor(2), _tensor(3)], 7), "split.tensors.count 7, expected 6"),
        (part(1, 3, [_tensor(2)], 6), "have 5 tensors, expected 6"),
        (part(1, 3, [_tensor(0), _tensor(3)], 6), "tensor 'tensor.0' is in both"),
        (
            part(1, 3, [_tensor(2), _tensor(3)], 6, entry("general.architecture", STRING, "llama")),
            "is of the architecture 'llama' and",
        ),
        (Header(tensors=[_tensor(2), _tensor(3)]), "split.no None, expected 1"),
        (
            Header(tensors=[_tensor(2), _tensor(3)], metadata=[entry("split.no", STRING, "1")]),
            "its split.no is '1', expected an integer",
        ),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
def test_parts_that_do_not_belong_together(tmp_path, wrong, seen):
    paths = _split(tmp_path)
    wrong.write(paths[1])
    message = _error(paths[0])
    assert seen in message


def test_a_part_linked_in_place_of_another_is_no_endless_search(tmp_path):
    paths = _split(tmp_path)
    paths[2].unlink()
    paths[2].symlink_to(paths[0])
    message = _error(paths[0])
    assert "00003-of-00003.gguf' has split.no 0, expected 2" in message


def test_a_part_under_another_name(tmp_path):
    paths = _split(tmp_path)
    for name in ("renamed.gguf", "model-00001-of-00002.gguf"):
        message = _refused(paths[0].rename(tmp_path / name))
        assert "is one of 3 parts by its metadata, but its name does not end in" in message
        (tmp_path / name).rename(paths[0])
    usual().write(paths[0])
    assert "is one of 1 parts by its metadata" in _refused(paths[0])


@pytest.mark.parametrize("count", [0, 100_000, (1 << 64) - 1])
def test_an_impossible_number_of_parts(tmp_path, count):
    header = usual()
    header.metadata.append(entry("split.count", U64, count))
    assert f"its split.count is {count}, expected 1 to 99999" in _refused_file(tmp_path, header)


# ---- directories -----------------------------------------------------------------------------------------


def test_the_only_model_of_a_directory(tmp_path):
    usual().write(tmp_path / "model.gguf")
    (tmp_path / "README.md").write_text("no model")
    assert open_gguf(tmp_path).architecture == "qwen3moe"
    assert holds_gguf(tmp_path) and holds_gguf(tmp_path / "model.gguf")
    assert not holds_gguf(tmp_path / "README.md")


def test_what_lies_beside_a_model_is_not_taken_for_one(tmp_path):
    _split(tmp_path, stem="Model-Q4_K_M")
    for kind in ("mmproj", "imatrix"):
        Header(metadata=[entry("general.type", STRING, kind)]).write(tmp_path / f"{kind}.gguf")
    Header(metadata=[entry("general.architecture", STRING, "clip")]).write(tmp_path / "old-mmproj.gguf")
    assert len(open_gguf(tmp_path).tensors) == 6


def test_several_models_in_a_directory_are_listed(tmp_path):
    _split(tmp_path, stem="Model-Q4_K_M")
    _split(tmp_path, stem="Model-Q8_0", parts=2)
    usual().write(tmp_path / "other.gguf")
    message = _refused(tmp_path)
    assert "holds 3 models: Model-Q4_K_M-00001-of-00003.gguf, Model-Q8_0-00001-of-00002.gguf, other.gguf" in (
        message
    )


def test_a_directory_without_models_names_those_below_it(tmp_path):
    (tmp_path / "Q4_K_M").mkdir()
    (tmp_path / "empty").mkdir()
    usual().write(tmp_path / "Q4_K_M" / "model.gguf")
    assert "holds no .gguf file, but its directories Q4_K_M do" in _refused(tmp_path, CheckpointPathError)
    assert "holds no .gguf file; give" in _refused(tmp_path / "empty", CheckpointPathError)
    assert not holds_gguf(tmp_path / "empty")


def test_integers_of_every_width_are_read_as_they_were_written(tmp_path):
    kinds = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 10: "Q", 11: "q"}
    header = Header()
    for kind, letter in kinds.items():
        most = (1 << (8 * struct.calcsize("<" + letter) - letter.islower())) - 1
        scalar = struct.pack("<" + letter, most)
        header.metadata.append(string(f"one.{kind}") + struct.pack("<I", kind) + scalar)
        header.metadata.append(string(f"many.{kind}") + struct.pack("<IIQ", ARRAY, kind, 2) + 2 * scalar)
    metadata = open_gguf(header.write(tmp_path / "model.gguf")).metadata
    for kind, letter in kinds.items():
        most = (1 << (8 * struct.calcsize("<" + letter) - letter.islower())) - 1
        assert metadata[f"one.{kind}"] == most
        assert metadata[f"many.{kind}"].tolist() == [most, most] == metadata[f"many.{kind}"][:]
    assert metadata[f"many.{I32}"].kind == "int32"
