"""Loading from files: every naming family, sharding, and each way a checkpoint can be wrong."""

import json
import os
import random
from pathlib import Path

import pytest
import torch
from api_support import (
    EXPERTS,
    HIDDEN,
    INTERMEDIATE,
    assert_close,
    make_wrapper,
    one_by_one,
    qwen_tensors,
    random_call,
    random_experts,
    reference,
    save_sharded,
    save_single,
)
from safetensors.torch import save_file

from kt_kernel import KTMoEWrapper
from kt_kernel.checkpoint import reader
from kt_kernel.checkpoint.experts import layer_experts
from kt_kernel.checkpoint.reader import open_checkpoint
from kt_kernel.errors import CheckpointError, CheckpointPathError, MissingTensorError

_EXPERTS = random_experts(seed=5)
_GATE_UP = torch.cat(_EXPERTS[:2], dim=1)


def _check_loads(path, layer_idx=0, slots=None, experts=_EXPERTS):
    wrapper = make_wrapper(layer_idx=layer_idx, weight_path=str(path))
    wrapper.load_weights(slots)
    call = random_call(1, 6)
    in_slots = experts if slots is None else [matrices[slots.long()] for matrices in experts]
    assert_close(wrapper.forward(*call), reference(in_slots, *call))


def _refused(path, error=CheckpointError, **changes) -> str:
    with pytest.raises(error) as caught:
        make_wrapper(weight_path=str(path), **changes).load_weights()
    message = str(caught.value)
    assert "\n" not in message and str(os.path.realpath(path)) in message
    return message


_QWEN = ("gate_proj", "up_proj", "down_proj")
_MIXTRAL = ("w1", "w3", "w2")


@pytest.mark.parametrize(
    ("base", "names"),
    [
        ("model.layers.7.mlp.experts", _QWEN),
        ("language_model.model.layers.7.mlp.experts", _QWEN),
        ("model.language_model.layers.7.mlp.experts", _QWEN),
        ("model.layers.7.block_sparse_moe.experts", _MIXTRAL),
        ("language_model.model.layers.7.block_sparse_moe.experts", _MIXTRAL),
        ("layers.7.experts", _MIXTRAL),
        ("model.layers.7.experts", _MIXTRAL),
    ],
)
def test_naming_families(tmp_path, base, names):
    tensors = one_by_one(_EXPERTS, base, names)
    # Neighbours that must not be taken for the layer's experts.
    tensors["model.layers.7.mlp.shared_experts.gate_proj.weight"] = torch.zeros(4, 4)
    tensors |= one_by_one(random_experts(seed=6), base.replace("7", "77"), names)
    _check_loads(save_single(tmp_path / "model", tensors), layer_idx=7)


@pytest.mark.parametrize("prefix", ["model.layers.2", "model.language_model.layers.2"])
def test_packed_experts(tmp_path, prefix):
    tensors = {
        f"{prefix}.mlp.experts.gate_up_proj": _GATE_UP,
        f"{prefix}.mlp.experts.down_proj": _EXPERTS[2],
    }
    _check_loads(save_single(tmp_path / "model", tensors), layer_idx=2)


@pytest.mark.parametrize("as_published", [True, False], ids=["one tensor per expert", "packed"])
@pytest.mark.parametrize("family", ["Qwen3Moe", "Mixtral"])
def test_what_transformers_saves_is_what_we_load(tmp_path, family, as_published):
    transformers = pytest.importorskip("transformers")
    sizes = {
        "Qwen3Moe": {"moe_intermediate_size": INTERMEDIATE, "num_experts": EXPERTS, "head_dim": 16},
        "Mixtral": {"intermediate_size": INTERMEDIATE, "num_local_experts": EXPERTS},
    }[family]
    config = getattr(transformers, family + "Config")(
        vocab_size=32,
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        **sizes,
    )
    torch.manual_seed(0)
    model = getattr(transformers, family + "ForCausalLM")(config).bfloat16()
    model.save_pretrained(tmp_path, save_original_format=as_published)
    state = model.state_dict()
    gate_up = state["model.layers.1.mlp.experts.gate_up_proj"]
    experts = (*gate_up.chunk(2, dim=1), state["model.layers.1.mlp.experts.down_proj"])
    _check_loads(tmp_path, layer_idx=1, experts=experts)


def test_shards_with_an_index_without_one_and_a_single_file(tmp_path):
    tensors = qwen_tensors(_EXPERTS)
    sharded = save_sharded(tmp_path / "sharded", tensors)
    _check_loads(sharded)
    (sharded / "model.safetensors.index.json").unlink()
    _check_loads(sharded)
    single = save_single(tmp_path / "single", tensors)
    _check_loads(single / "model.safetensors")


def test_links_as_the_hub_cache_makes_them(tmp_path):
    blobs = save_single(tmp_path / "blobs", qwen_tensors(_EXPERTS))
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    (snapshot / "model.safetensors").symlink_to(blobs / "model.safetensors")
    (tmp_path / "link").symlink_to(snapshot)
    _check_loads(tmp_path / "link")


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_map_puts_checkpoint_experts_into_slots(tmp_path, dtype):
    path = save_single(tmp_path / "model", qwen_tensors(_EXPERTS))
    _check_loads(path, slots=torch.tensor([5, 2, 7, 0, 1, 3, 6, 4], dtype=dtype))


def test_data_at_an_odd_offset_is_read_right(tmp_path):
    """The format does not promise alignment; the header here is one byte longer than a multiple of 8."""
    path = save_single(tmp_path / "model", qwen_tensors(_EXPERTS)) / "model.safetensors"
    raw = path.read_bytes()
    header_bytes = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + header_bytes] + b" "
    path.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + header_bytes :])
    _check_loads(tmp_path / "model")


def test_experts_are_views_of_the_file_not_copies(tmp_path):
    path = save_single(tmp_path / "model", qwen_tensors(_EXPERTS))
    checkpoint = open_checkpoint(path)
    with layer_experts(
        checkpoint, 0, "BF16", num_experts=EXPERTS, hidden=HIDDEN, intermediate=INTERMEDIATE
    ) as experts:
        file = checkpoint.file_of("model.layers.0.mlp.experts.0.up_proj.weight")
        begin = file.bytes.data_ptr()
        for matrix in experts.all():
            assert begin <= matrix.weight.data_ptr() < begin + file.bytes.numel()


def _resident_file_pages(path) -> int:
    """Bytes of the file's mapping that this process holds in memory."""
    resident, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ", 1)[0]:
            inside = str(path) in line
        elif inside and line.startswith("Rss:"):
            resident += int(line.split()[1]) * 1024
    return resident


def test_pages_are_given_back_after_each_layer(tmp_path):
    big = random_experts(seed=8, experts=4, hidden=1024, intermediate=512)  # 12 MB a layer
    tensors = {}
    for layer in range(3):
        tensors |= qwen_tensors(big, layer)
    path = save_single(tmp_path / "model", tensors)
    for layer in range(3):
        wrapper = make_wrapper(
            layer_idx=layer,
            num_experts=4,
            hidden_size=1024,
            moe_intermediate_size=512,
            weight_path=str(path),
        )
        wrapper.load_weights()
        assert _resident_file_pages(path / "model.safetensors") < 2_000_000


def test_all_layers_share_one_reader_until_the_files_change(tmp_path, monkeypatch):
    opened = []
    real_file = reader.SafetensorsFile
    monkeypatch.setattr(reader, "SafetensorsFile", lambda path: opened.append(path) or real_file(path))
    tensors = qwen_tensors(_EXPERTS) | qwen_tensors(_EXPERTS, 1)
    path = save_sharded(tmp_path / "model", tensors, shards=2)
    (tmp_path / "link").symlink_to(path)
    for layer in (0, 1):
        _check_loads(path, layer_idx=layer)
        _check_loads(tmp_path / "link", layer_idx=layer)
    assert len(opened) == 2
    newer = random_experts(seed=9)
    save_sharded(path, qwen_tensors(newer) | qwen_tensors(newer, 1), shards=2)
    _check_loads(path, experts=newer)
    KTMoEWrapper.force_release_loader()
    _check_loads(path, experts=newer)


# ---- what can be wrong -----------------------------------------------------------------------


def test_missing_path(tmp_path):
    message = _refused(tmp_path / "nowhere", CheckpointPathError)
    assert "does not exist" in message
    with pytest.raises(FileNotFoundError):
        make_wrapper(weight_path="Org/Model-Name").load_weights()
    with pytest.raises(CheckpointPathError, match="weight_path is not given"):
        make_wrapper(weight_path=None).load_weights()


def test_directory_without_weights(tmp_path):
    assert "no .safetensors file" in _refused(tmp_path, CheckpointPathError)


@pytest.mark.parametrize("keep", [0, 5, 8, 100, "half", "all but one byte"])
def test_truncated_file(tmp_path, keep):
    path = save_single(tmp_path / "model", qwen_tensors(_EXPERTS)) / "model.safetensors"
    raw = path.read_bytes()
    keep = {"half": len(raw) // 2, "all but one byte": len(raw) - 1}.get(keep, keep)
    path.write_bytes(raw[:keep])
    message = _refused(tmp_path / "model")
    assert "cut off" in message and str(path) in message


def test_truncated_shard_behind_an_index(tmp_path):
    path = save_sharded(tmp_path / "model", qwen_tensors(_EXPERTS))
    shard = path / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    assert str(shard) in _refused(path)


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs pointer"),
        (b"<html>not found</html>" * 40, "no safetensors file"),
        ((20).to_bytes(8, "little") + b"{not json" + b" " * 30, "damaged safetensors header"),
        ((2).to_bytes(8, "little") + b"[]" + b" " * 30, "damaged safetensors header"),
    ],
)
def test_file_that_is_no_safetensors(tmp_path, content, fragment):
    (tmp_path / "model.safetensors").write_bytes(content)
    assert fragment in _refused(tmp_path)


def _with_header(path, change) -> None:
    """Rewrite the header of a file by `change(header)`, data untouched."""
    raw = path.read_bytes()
    header_bytes = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + header_bytes])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + header_bytes :])


@pytest.mark.parametrize("offsets", [[0, 10], [-8, 0], [-2 * INTERMEDIATE * HIDDEN, 0], [100, 50], [0], None])
def test_header_with_impossible_offsets(tmp_path, offsets):
    path = save_single(tmp_path / "model", qwen_tensors(_EXPERTS))
    name = "model.layers.0.mlp.experts.1.up_proj.weight"
    _with_header(path / "model.safetensors", lambda header: header[name].update(data_offsets=offsets))
    assert "header" in _refused(path)


def test_damaged_header_bytes_never_give_anything_but_our_errors(tmp_path):
    path = save_single(tmp_path / "model", qwen_tensors(_EXPERTS)) / "model.safetensors"
    raw = path.read_bytes()
    header_bytes = int.from_bytes(raw[:8], "little")
    choose = random.Random(7)
    refused = 0
    for _ in range(300):
        damaged = bytearray(raw)
        for _ in range(choose.randint(1, 4)):
            damaged[choose.randrange(8 + header_bytes)] = choose.randrange(256)
        path.write_bytes(damaged)
        KTMoEWrapper.force_release_loader()
        try:
            make_wrapper(weight_path=str(path)).load_weights()
        except CheckpointError:
            refused += 1
    assert refused > 200


@pytest.mark.parametrize("projection", _QWEN)
@pytest.mark.parametrize("expert", [0, 3])
@pytest.mark.parametrize("save", [save_single, save_sharded])
def test_missing_tensor(tmp_path, projection, expert, save):
    tensors = qwen_tensors(_EXPERTS)
    name = f"model.layers.0.mlp.experts.{expert}.{projection}.weight"
    del tensors[name]
    message = _refused(save(tmp_path / "model", tensors), MissingTensorError)
    assert f"'{name}'" in message


@pytest.mark.parametrize(
    ("stored", "missing"), [("gate_up_proj", "down_proj"), ("down_proj", "gate_up_proj")]
)
def test_missing_packed_tensor(tmp_path, stored, missing):
    path = save_single(tmp_path / "model", {f"model.layers.0.mlp.experts.{stored}": _GATE_UP})
    assert f"experts.{missing}' is not in the checkpoint" in _refused(path, MissingTensorError)


def test_tensor_that_the_index_promises_and_the_file_lacks(tmp_path):
    path = save_sharded(tmp_path / "model", qwen_tensors(_EXPERTS))
    index = path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    moved = "model.layers.0.mlp.experts.2.up_proj.weight"
    home = content["weight_map"][moved]
    content["weight_map"][moved] = next(name for name in content["weight_map"].values() if name != home)
    index.write_text(json.dumps(content))
    message = _refused(path, MissingTensorError)
    assert moved in message and content["weight_map"][moved] in message


def test_file_that_the_index_names_and_the_directory_lacks(tmp_path):
    path = save_sharded(tmp_path / "model", qwen_tensors(_EXPERTS))
    (path / "model-00002-of-00003.safetensors").unlink()
    assert "model-00002-of-00003.safetensors" in _refused(path, CheckpointPathError)


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"metadata": {}}', '{"weight_map": 3}', '{"weight_map": {"a": 3}}']
)
def test_damaged_index(tmp_path, content):
    path = save_sharded(tmp_path / "model", qwen_tensors(_EXPERTS))
    (path / "model.safetensors.index.json").write_text(content)
    assert "damaged" in _refused(path)


def test_same_tensor_in_two_files_without_an_index(tmp_path):
    path = save_single(tmp_path / "model", qwen_tensors(_EXPERTS))
    save_file(qwen_tensors(_EXPERTS), path / "old.safetensors")
    assert "is in both" in _refused(path)


@pytest.mark.parametrize(
    ("dtype", "name", "advice"),
    [
        (torch.float16, "F16", "convert the checkpoint"),
        (torch.float32, "F32", "convert the checkpoint"),
        (torch.float8_e4m3fn, "F8_E4M3", "stored alike"),
    ],
)
def test_wrong_dtype_in_the_file(tmp_path, dtype, name, advice):
    tensors = qwen_tensors(_EXPERTS)
    wrong = "model.layers.0.mlp.experts.4.down_proj.weight"
    tensors[wrong] = tensors[wrong].to(dtype)
    message = _refused(save_single(tmp_path / "model", tensors))
    assert wrong in message and f"dtype {name}" in message and advice in message


def test_wrong_shape_in_the_file(tmp_path):
    tensors = qwen_tensors(_EXPERTS)
    wrong = "model.layers.0.mlp.experts.4.down_proj.weight"
    tensors[wrong] = tensors[wrong].t().contiguous()
    message = _refused(save_single(tmp_path / "model", tensors))
    assert wrong in message and f"[{INTERMEDIATE}, {HIDDEN}], expected [{HIDDEN}, {INTERMEDIATE}]" in message


def test_packed_experts_the_other_way_round(tmp_path):
    tensors = {
        "model.layers.0.mlp.experts.gate_up_proj": _GATE_UP.transpose(1, 2).contiguous(),
        "model.layers.0.mlp.experts.down_proj": _EXPERTS[2],
    }
    assert f"expected [{EXPERTS}, {2 * INTERMEDIATE}, {HIDDEN}]" in _refused(
        save_single(tmp_path / "model", tensors)
    )


@pytest.mark.parametrize("described", [EXPERTS - 2, EXPERTS + 4])
@pytest.mark.parametrize("packed", [False, True])
def test_num_experts_unlike_the_file(tmp_path, described, packed):
    tensors = qwen_tensors(_EXPERTS)
    if packed:
        tensors = {
            "model.layers.0.mlp.experts.gate_up_proj": _GATE_UP,
            "model.layers.0.mlp.experts.down_proj": _EXPERTS[2],
        }
    message = _refused(save_single(tmp_path / "model", tensors), num_experts=described)
    assert f"num_experts is {described}" in message and f"holds {EXPERTS} experts" in message


def test_layer_without_experts(tmp_path):
    path = save_single(tmp_path / "model", qwen_tensors(_EXPERTS, layer=3))
    message = _refused(path, MissingTensorError, layer_idx=1)
    assert "layer 1 has no routed experts" in message and "model.layers.3.mlp.experts" in message


def test_refused_load_leaves_the_process_able_to_load(tmp_path):
    broken = save_single(tmp_path / "broken", {})
    _refused(broken, MissingTensorError)
    _check_loads(save_single(tmp_path / "good", qwen_tensors(_EXPERTS)))
