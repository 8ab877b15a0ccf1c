"""What is fuzzed: readers of files and flags that others made. Each target takes any bytes, and reads them or
raises a KTError of one line; whatever else it raises is a defect.

`SEEDS` are inputs that are read, from which others are made.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save

from kt_kernel.checkpoint.reader import Checkpoint
from kt_kernel.checkpoint.safetensors_file import TORCH_DTYPES
from kt_kernel.checkpoint.sources import SafetensorsExperts
from kt_kernel.errors import KTError

sys.path.append(str(Path(__file__).parents[1] / "gguf_files"))

INDEX = "model.safetensors.index.json"
EXPERTS, HIDDEN, INTERMEDIATE = 2, 32, 32


@cache
def folder() -> Path:
    """Of this process, in memory where there is such a place."""
    memory = Path("/dev/shm")
    place = tempfile.TemporaryDirectory(prefix="kt-fuzz-", dir=memory if os.access(memory, os.W_OK) else None)
    folder.place = place  # until the process ends
    return Path(place.name)


def _written(name: str, data: bytes) -> Path:
    path = folder() / name
    path.write_bytes(data)
    return path


# ---- safetensors ---------------------------------------------------------------------------------


def _tensors() -> dict[str, torch.Tensor]:
    shapes = {"gate_proj": (INTERMEDIATE, HIDDEN), "up_proj": (INTERMEDIATE, HIDDEN)}
    shapes["down_proj"] = (HIDDEN, INTERMEDIATE)
    prefix = "model.layers.0.mlp.experts"
    return {
        f"{prefix}.{expert}.{name}.weight": torch.zeros(shape, dtype=torch.bfloat16)
        for expert in range(EXPERTS)
        for name, shape in shapes.items()
    }


def safetensors(data: bytes) -> None:
    """A file of weights: header, names, methods, views."""
    _read_checkpoint(_written("model.safetensors", data))


def _read_checkpoint(path: Path) -> None:
    checkpoint = Checkpoint(str(path))
    for name in list(checkpoint.names()):
        info = checkpoint.info(name)
        if info.dtype in TORCH_DTYPES:
            with contextlib.suppress(KTError):
                view = checkpoint.view(name)
                assert view.numel() == 0 or view.reshape(-1)[-1:].view(torch.uint8).numel() >= 0
    experts = SafetensorsExperts(checkpoint)
    for read in (experts.method, experts.has_biases, experts.gate_up_rows, experts.layer_bytes):
        with contextlib.suppress(KTError):
            read()
    with contextlib.suppress(KTError):
        sizes = {"num_experts": EXPERTS, "hidden": HIDDEN, "intermediate": INTERMEDIATE}
        experts.views(0, experts.method(), **sizes)


def index(data: bytes) -> None:
    """The list of a checkpoint's tensors, beside two files of weights."""
    place = folder() / "indexed"
    if not place.exists():
        place.mkdir()
        tensors = sorted(_tensors().items())
        for number, part in enumerate((tensors[:3], tensors[3:])):
            (place / f"part{number}.safetensors").write_bytes(save(dict(part)))
    (place / INDEX).write_bytes(data)
    _read_checkpoint(place)


def _index() -> bytes:
    names = sorted(_tensors())
    files = {name: f"part{at // 3}.safetensors" for at, name in enumerate(names)}
    return json.dumps({"metadata": {"total_size": 1}, "weight_map": files}).encode()


# ---- configurations ------------------------------------------------------------------------------


def config(data: bytes) -> None:
    """A model's config.json, as plans and servers read it."""
    from kt_kernel.planning.config_facts import sizes_of_config

    place = folder() / "configured"
    if not place.exists():
        place.mkdir()
        (place / "model.safetensors").write_bytes(save(_tensors()))
    (place / "config.json").write_bytes(data)
    sizes = sizes_of_config(Checkpoint(str(place)).config("config.json"))
    assert sizes.layers > 0 and sizes.experts > 0, sizes


CONFIGS = (
    {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_hidden_layers": 4,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "hidden_size": 256,
        "moe_intermediate_size": 128,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 512,
        "max_position_embeddings": 2048,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    {
        "model_type": "deepseek_v3",
        "num_hidden_layers": 3,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "hidden_size": 64,
        "moe_intermediate_size": 32,
        "num_attention_heads": 4,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    },
    {
        "text_config": {
            "model_type": "qwen3_next",
            "num_hidden_layers": 4,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "hidden_size": 64,
            "moe_intermediate_size": 32,
            "num_attention_heads": 4,
            "layer_types": ["linear_attention", "full_attention"] * 2,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "linear_conv_kernel_dim": 4,
        }
    },
)


# ---- GGUF ----------------------------------------------------------------------------------------


def gguf(data: bytes) -> str:
    """A GGUF file: every value, every tensor, its experts."""
    from fuzz_reader import read_everything

    return read_everything(_written("model.gguf", data))


def _gguf_seeds() -> list[bytes]:
    from fuzz_reader import _WHOLE

    return list(_WHOLE)


# ---- flags ---------------------------------------------------------------------------------------


@cache
def _parser() -> argparse.ArgumentParser:
    from kt_kernel.integrations.sglang.cli import add_flags
    from kt_kernel.integrations.sglang.flags import FLAGS

    parser = argparse.ArgumentParser(exit_on_error=True)
    for flag in FLAGS:
        if flag.own is None:  # SGLang's own parser has it: words there are texts and integers
            kind = str if flag.field in ("weight_path", "method") else int
            parser.add_argument(flag.option, dest=flag.destination, type=kind)
    add_flags(None, parser)
    return parser


def flags(data: bytes) -> str:
    """Words of a command line, each behind a zero byte; one of a single byte is that flag of our table."""
    from kt_kernel.integrations.sglang.flags import FLAGS, KTFlags, check_flags

    words = [word.decode("utf-8", "replace") for word in data.split(b"\0")]
    words = [
        FLAGS[ord(word) % len(FLAGS)].option if len(word) == 1 and not word.isdigit() else word
        for word in words
    ]
    with contextlib.redirect_stderr(io.StringIO()):
        try:
            values = vars(_parser().parse_args(["--kt-weight-path", "/", *words]))
        except SystemExit as ended:
            assert ended.code in (0, 2), ended.code
            return "refused by argparse"
    check_flags(KTFlags.read(values))
    return "read"


def _flag_seeds() -> list[bytes]:
    from kt_kernel.integrations.sglang.flags import FLAGS

    values = ("1", "0", "-1", "0.5", "uniform", "auto", "nan", "1e400", "99999999999999999999", "BF16")
    return [
        f"{flag.option}\0{value}".encode() for flag in FLAGS for value in values[:: 1 + len(flag.option) % 3]
    ]


# Some tell themselves how it went.
TARGETS: dict[str, Callable[[bytes], str | None]] = {
    "safetensors": safetensors,
    "index": index,
    "config": config,
    "gguf": gguf,
    "flags": flags,
}
SEEDS: dict[str, Callable[[], list[bytes]]] = {
    "safetensors": lambda: [save(_tensors()), save({"a": torch.zeros(3)}, {"format": "pt"})],
    "index": lambda: [_index()],
    "config": lambda: [json.dumps(config).encode() for config in CONFIGS],
    "gguf": _gguf_seeds,
    "flags": _flag_seeds,
}


def check(target: str, data: bytes) -> str:
    """How it went: "read", or the kind of error. Raises for anything but a KTError of one line."""
    try:
        return TARGETS[target](data) or "read"
    except KTError as error:
        message = str(error)
        assert message and "\n" not in message, message
        return type(error).__name__
