"""A draft model's experts must not all go to the device without a word: they are placed, or counted.

The server is followed to the point where the draft model is loaded, and its layer is called there; serving
with one is test_speculative_served.py's.
"""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from types import SimpleNamespace

import draft_probe
import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from server import Server, kt_options

from kt_kernel.checkpoint.sources import open_experts
from kt_kernel.errors import ConfigurationError
from kt_kernel.hybrid.layout import ExpertLayout
from kt_kernel.integrations.sglang import draft
from kt_kernel.integrations.sglang.flags import KTFlags
from kt_kernel.integrations.sglang.settings import KTSettings, make_settings

LAYERS, EXPERTS = 4, 16
SPECULATION = (
    *("--speculative-algorithm", "NEXTN", "--speculative-num-steps", "1"),
    *("--speculative-eagle-topk", "1", "--speculative-num-draft-tokens", "2"),
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """family -> the folder of its tiny checkpoint with a layer for speculation."""
    root = tmp_path_factory.mktemp("draft")

    def build(family: str) -> Path:
        return tiny_models.add_next_token_layer(tiny_models.build(family, root / family))

    return build


@pytest.mark.parametrize("family", ["glm4_moe", "deepseek_v3"])
def test_the_next_token_layer_is_split_like_the_others(checkpoint, tmp_path, family):
    model = checkpoint(family)
    (tmp_path / "plugin").mkdir()
    environment = draft_probe.install(tmp_path / "plugin")
    options = [*kt_options(model, 3), "--dtype", "float32", *SPECULATION]
    server = Server(model, tmp_path / "log", options, environment)
    file = draft_probe.answer(tmp_path / "plugin")
    deadline = time.monotonic() + 150
    try:
        while not file.exists() and server.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.2)
        server.wait_until_healthy()  # interrupted while it starts, it takes half a minute to end
    finally:
        server.stop()
    assert file.exists(), server.log_tail()
    found = json.loads(file.read_text())
    model_itself, draft_model = sorted(found["models"], key=lambda served: served["draft"])
    assert model_itself["layers"] == [[layer, [0, 1, 2]] for layer in range(1, LAYERS)]
    assert draft_model["layers"] == [[LAYERS, [0, 1, 2]]]
    assert "the draft model's layer 4: 3 of its 16 experts on the device" in server.log_text()
    assert server.log_text().count("memory of experts on rank 0:") == 2

    output, expected = torch.tensor(found["output"]).double(), reference(model, found)
    assert (output - expected).square().sum() / expected.square().sum() < 1e-5


def reference(model: Path, found: dict) -> torch.Tensor:
    """The weighted sum of the experts of the layer behind the last one, from the file, in double."""
    tensors = load_file(model / "model.safetensors")
    rows, routing = torch.tensor(found["hidden"]).double(), torch.tensor(found["weights"]).double()
    output = torch.zeros_like(rows)
    for token, experts in enumerate(found["ids"]):
        for place, expert in enumerate(experts):
            gate, up, down = (
                tensors[f"model.layers.{LAYERS}.mlp.experts.{expert}.{name}_proj.weight"].double()
                for name in ("gate", "up", "down")
            )
            inner = torch.nn.functional.silu(gate @ rows[token]) * (up @ rows[token])
            output[token] += routing[token, place] * (down @ inner)
    return output


# ---- what is decided before anything is loaded -------------------------------------------------------


def weights(path: Path, experts: dict[str, torch.dtype], layers: int = 1) -> Path:
    """A checkpoint of nothing but the named groups of experts, two of 128 x 128 each."""
    path.mkdir()
    tensors = {}
    for base, dtype in experts.items():
        for name in (f"{base}.{expert}.{part}_proj" for expert in (0, 1) for part in ("gate", "up", "down")):
            tensors[f"{name}.weight"] = torch.zeros(128, 128).to(dtype)
            if dtype == torch.float8_e4m3fn:
                tensors[f"{name}.weight_scale_inv"] = torch.ones(1, 1)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps({"num_hidden_layers": layers}))
    return path


def settings(path: Path, **flags: object) -> KTSettings:
    given = KTFlags(weight_path=str(path), method="FP8", cpuinfer=2, threadpool_count=1, **flags)
    return make_settings(given, ExpertLayout(1, 2, (0,)), max_tokens=64)


def placed(path: Path, architecture: str, algorithm: str | None = "EAGLE", draft_path: Path | None = None):
    options = SimpleNamespace(
        speculative_algorithm=algorithm,
        speculative_draft_model_path=None if draft_path is None else str(draft_path),
        model_path=str(path),
        trust_remote_code=False,
    )
    model = SimpleNamespace(hf_config=SimpleNamespace(architectures=[architecture]))
    return draft.with_draft(settings(path, num_gpu_experts=1), options, model).draft


FP8, BF16 = torch.float8_e4m3fn, torch.bfloat16
MODEL = {"model.layers.0.mlp.experts": FP8}


@pytest.mark.parametrize(
    ("architecture", "base", "dtype", "method"),
    [
        ("DeepseekV3ForCausalLM", "model.layers.1.mlp.experts", FP8, "FP8"),
        # quantised models often keep this layer in bf16
        ("Glm4MoeForCausalLM", "model.layers.1.mlp.experts", BF16, "BF16"),
        ("Qwen3NextForCausalLM", "mtp.layers.0.mlp.experts", BF16, "BF16"),
    ],
)
def test_the_layer_is_found_under_each_familys_name_in_its_own_format(
    tmp_path, architecture, base, dtype, method
):
    path = weights(tmp_path / "model", MODEL | {base: dtype})
    assert open_experts(path).draft_method(1) == method
    found = placed(path, architecture)
    assert (found.options.method, found.layout.moe_layers, found.device_experts) == (method, (1,), 1)
    assert found.device_mask(1, 2).tolist() == [True, False]


def test_a_draft_layer_is_neither_streamed_nor_moved_nor_deferred(tmp_path):
    path = weights(tmp_path / "model", MODEL)
    busy = settings(
        path,
        num_gpu_experts=1,
        gpu_prefill_token_threshold=8,
        max_deferred_experts_per_token=1,
        enable_dynamic_expert_update=True,
        expert_update_interval=4,
        miss_policy="auto",
        record_gpu_expert_distribution=True,
    )
    assert busy.options.hybrid().copies_experts and busy.records
    single = draft.draft_settings(busy, "FP8")
    assert not single.options.hybrid().copies_experts
    assert single.options.max_deferred_experts_per_token == 0
    assert (single.records, single.for_draft_model) == (False, True)


@pytest.mark.parametrize("algorithm", [None, "NGRAM"])
def test_without_a_draft_model_nothing_is_placed_or_said(tmp_path, caplog, algorithm):
    path = weights(tmp_path / "model", MODEL | {"model.layers.1.mlp.experts": FP8})
    assert placed(path, "DeepseekV3ForCausalLM", algorithm) is None
    assert not caplog.records


def test_experts_that_are_not_placed_are_counted_in_one_line(tmp_path, caplog, monkeypatch):
    path = weights(tmp_path / "model", MODEL | {"mtp.0.ffn.experts": BF16})
    other = weights(tmp_path / "other", {"model.layers.0.mlp.experts": BF16})
    monkeypatch.setattr(draft, "_has_experts", lambda path, options: True)
    for draft_path, said in ((None, path), (other, other)):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert placed(path, "DeepseekV4ForCausalLM", draft_path=draft_path) is None
        (line,) = [record.getMessage() for record in caplog.records]
        # six matrices of 128 x 128 in two bytes
        assert line.endswith("all of them are on the device, 0.2 MB")
        assert str(said) in line


def test_a_head_without_experts_needs_no_line(tmp_path, caplog, monkeypatch):
    path = weights(tmp_path / "model", MODEL)
    monkeypatch.setattr(draft, "_has_experts", lambda path, options: False)
    assert placed(path, "DeepseekV3ForCausalLM", draft_path=tmp_path / "not-there") is None
    assert not caplog.records


def test_a_draft_model_whose_size_cannot_be_told_is_refused(tmp_path, monkeypatch):
    path = weights(tmp_path / "model", MODEL)
    monkeypatch.setattr(draft, "_has_experts", lambda path, options: True)
    with pytest.raises(ConfigurationError, match="cannot be told before it is downloaded"):
        placed(path, "DeepseekV3ForCausalLM", draft_path=tmp_path / "not-there")
