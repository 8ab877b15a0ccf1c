"""The --kt-* flags: what is refused, with which sentence, and what the defaults become. No server."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from kt_kernel.errors import CheckpointPathError, ConfigurationError, FeatureUnavailableError
from kt_kernel.hybrid.layout import ExpertLayout, expert_layout
from kt_kernel.integrations import options as expert_options
from kt_kernel.integrations.sglang.flags import FLAGS, KTFlags, check_flags
from kt_kernel.integrations.sglang.other_options import check_other_options
from kt_kernel.integrations.sglang.settings import make_settings

LAYOUT = ExpertLayout(num_layers=4, num_experts=16, moe_layers=(1, 2, 3))

# The flags of the interface, and five of our own: each must parse.
INTERFACE = {
    "--kt-weight-path",
    "--kt-method",
    "--kt-activations",
    "--kt-gguf-mmap",
    "--kt-cpu-operators",
    "--kt-cpu-ranks",
    "--kt-cpuinfer",
    "--kt-threadpool-count",
    "--kt-numa-nodes",
    "--kt-num-gpu-experts",
    "--kt-gpu-experts-ratio",
    "--kt-max-deferred-experts-per-token",
    "--kt-gpu-prefill-token-threshold",
    "--kt-enable-dynamic-expert-update",
    "--kt-expert-placement-strategy",
    "--kt-expert-update-interval",
    "--kt-miss-policy",
    "--kt-verify",
    "--record-kt-gpu-expert-distribution",
    "--kt-lora-path",
    "--kt-expert-lora-path",
}


def test_every_flag_of_the_interface_is_in_the_table():
    assert {flag.option for flag in FLAGS} == INTERFACE


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"cpuinfer": 0}, "--kt-cpuinfer is 0, expected at least 1"),
        ({"threadpool_count": 0}, "--kt-threadpool-count is 0"),
        ({"num_gpu_experts": -1}, "--kt-num-gpu-experts is -1"),
        ({"max_deferred_experts_per_token": -2}, "--kt-max-deferred-experts-per-token is -2"),
        ({"gpu_prefill_token_threshold": -1}, "--kt-gpu-prefill-token-threshold is -1"),
        ({"expert_update_interval": -5}, "--kt-expert-update-interval is -5, expected at least 0"),
        ({"gpu_experts_ratio": 1.5}, "--kt-gpu-experts-ratio is 1.5, expected a number from 0 to 1"),
        ({"gpu_experts_ratio": -0.5}, "--kt-gpu-experts-ratio is -0.5, expected a number from 0 to 1"),
        ({"gpu_experts_ratio": float("nan")}, "--kt-gpu-experts-ratio is nan"),
        ({"enable_dynamic_expert_update": True}, "without an occasion to move experts"),
        ({"expert_update_interval": 8}, "8 without --kt-enable-dynamic-expert-update"),
        ({"expert_placement_strategy": "frequency"}, "frequency needs counts of an earlier run"),
        ({"init_expert_location": "counts.pt"}, "counts.pt is read by .* but the strategy is uniform"),
        ({"activations": "fp4"}, "--kt-activations is 'fp4', expected one of auto, bf16, int8"),
        ({"numa_nodes": (0, 1), "threadpool_count": 1}, "names 2 nodes"),
        ({"cpuinfer": 2, "threadpool_count": 4}, "more than the 2 threads"),
        ({"lora_path": "a", "expert_lora_path": "b"}, "they mean the same"),
    ],
)
def test_impossible_values_name_the_flag_and_the_value(tmp_path, flags, sentence):
    with pytest.raises(ConfigurationError, match=sentence):
        check_flags(KTFlags(weight_path=str(tmp_path), **flags))


def test_a_missing_weight_path_is_found_before_loading(tmp_path):
    with pytest.raises(CheckpointPathError, match="does not exist"):
        check_flags(KTFlags(weight_path=str(tmp_path / "nothing")))


def test_flags_without_a_weight_path_are_not_silently_without_effect():
    with pytest.raises(ConfigurationError, match="--kt-num-gpu-experts is given without --kt-weight-path"):
        check_flags(KTFlags(num_gpu_experts=4))
    check_flags(KTFlags())


@pytest.mark.parametrize(
    ("asked", "method"), [("AUTO", "AMXINT8"), ("AMXINT8", "AMXINT8"), ("MOE_INT8", "MOE_INT8")]
)
def test_a_method_with_two_names_is_asked_for_by_either(tmp_path, asked, method):
    tensors = {}
    for name in (f"model.layers.0.mlp.experts.0.{part}_proj" for part in ("gate", "up", "down")):
        tensors[f"{name}.weight"] = torch.zeros(64, 64, dtype=torch.int8)
        tensors[f"{name}.weight_scale"] = torch.ones(64, 1)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    flags = KTFlags(weight_path=str(tmp_path), method=asked, activations="int8")
    assert flags.options().weight_method() == method
    with pytest.raises(ConfigurationError, match=r"--kt-method is BF16, but .* holds AMXINT8 experts"):
        KTFlags(weight_path=str(tmp_path), method="BF16").options().weight_method()


def test_every_flag_about_the_cpu_reaches_the_layers(monkeypatch):
    monkeypatch.setattr(expert_options, "KTMoEWrapper", dict)
    given = {"weight_path": "w", "method": "RAWINT4", "activations": "int8", "cpuinfer": 2}
    flags = KTFlags(**given, gguf_mmap=True, threadpool_count=1, max_deferred_experts_per_token=3)
    layer = make_settings(flags, LAYOUT, max_tokens=64).options.wrapper(num_experts_per_tok=2)
    assert layer == {
        "weight_path": "w",
        "method": "RAWINT4",
        "activations": "int8",
        "weight_storage": "mapped",
        "cpuinfer_threads": 2,
        "threadpool_count": 1,
        "numa_nodes": None,
        "max_deferred_experts_per_token": 2,  # a token has no more
        "num_experts_per_tok": 2,
    }


def test_no_expert_count_means_all_experts_on_the_cpu_not_none():
    settings = make_settings(KTFlags(weight_path="w", cpuinfer=2, threadpool_count=1), LAYOUT, max_tokens=64)
    assert settings.device_experts == 0
    assert not settings.device_mask(1, 16).any()


def test_the_expert_count_is_per_layer():
    flags = KTFlags(weight_path="w", cpuinfer=2, threadpool_count=1, num_gpu_experts=4)
    settings = make_settings(flags, LAYOUT, max_tokens=64)
    for layer in LAYOUT.moe_layers:
        assert settings.device_mask(layer, 16).nonzero().flatten().tolist() == [0, 1, 2, 3]


def test_the_ratio_counts_all_experts_and_wins_over_the_number():
    flags = KTFlags(
        weight_path="w", cpuinfer=2, threadpool_count=1, num_gpu_experts=9, gpu_experts_ratio=0.25
    )
    settings = make_settings(flags, LAYOUT, max_tokens=64)
    assert settings.device_experts == 12
    assert sum(int(settings.device_mask(layer, 16).sum()) for layer in LAYOUT.moe_layers) == 12


def test_more_device_experts_than_experts_are_refused():
    flags = KTFlags(weight_path="w", cpuinfer=2, threadpool_count=1, num_gpu_experts=17)
    with pytest.raises(ConfigurationError, match="a layer of this model has 16 experts"):
        make_settings(flags, LAYOUT, max_tokens=64)


def test_a_layer_the_configuration_does_not_announce_is_refused_only_if_it_matters():
    on_cpu = make_settings(KTFlags(weight_path="w", cpuinfer=2, threadpool_count=1), LAYOUT, max_tokens=64)
    assert not on_cpu.device_mask(0, 8).any()
    flags = KTFlags(weight_path="w", cpuinfer=2, threadpool_count=1, num_gpu_experts=4)
    with pytest.raises(ConfigurationError, match="layer 0 has 8 experts"):
        make_settings(flags, LAYOUT, max_tokens=64).device_mask(0, 8)


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        ({"num_local_experts": 8}, (0, 1, 2, 3, 4, 5)),
        ({"n_routed_experts": 8, "first_k_dense_replace": 3, "moe_layer_freq": 1}, (3, 4, 5)),
        ({"n_routed_experts": 8, "first_k_dense_replace": 1, "moe_layer_freq": 2}, (2, 4)),
        ({"n_routed_experts": 8, "moe_layer_freq": [0, 0, 1, 1, 0, 1]}, (2, 3, 5)),
        ({"num_experts": 8, "decoder_sparse_step": 2, "mlp_only_layers": [3]}, (1, 5)),
    ],
)
def test_the_layers_with_experts_are_found(config, layers):
    layout = expert_layout(SimpleNamespace(num_hidden_layers=6, **config))
    assert (layout.num_experts, layout.moe_layers) == (8, layers)


@pytest.mark.parametrize("backend", ["breakable", "tc_piecewise", "of a later release"])
def test_graphs_of_decoding_in_pieces_are_refused(backend):
    """SGLang's own parser refuses some of them; programs can make the configuration without it."""
    options = _other_options(backend)
    with pytest.raises(
        FeatureUnavailableError,
        match=f"^not available yet: --cuda-graph-backend-decode {backend} together with --kt-weight-path",
    ):
        check_other_options(options)


@pytest.mark.parametrize("backend", ["full", "disabled"])
def test_whole_graphs_of_decoding_or_none_are_accepted(backend):
    check_other_options(_other_options(backend))


@pytest.mark.parametrize(
    ("option", "value", "named"),
    [
        ("enable_paged_experts", True, "--enable-paged-experts"),
        ("dwdp_size", 2, "--dwdp-size 2"),
        ("tokenizer_worker_num", 2, "--tokenizer-worker-num 2"),
    ],
)
def test_options_that_would_go_wrong_without_a_word_are_refused(option, value, named):
    """SGLang would ignore the first, with the second take our slots for all experts, and with the third check
    no request.
    """
    options = _other_options("full")
    setattr(options, option, value)
    with pytest.raises(FeatureUnavailableError, match=f"^not available yet: {named} together with"):
        check_other_options(options)


def _other_options(decode_backend: str) -> SimpleNamespace:
    """SGLang's options as they are by default, but for one."""
    return SimpleNamespace(
        chunked_prefill_size=4096,
        ep_size=1,
        enable_eplb=False,
        ep_num_redundant_experts=0,
        moe_a2a_backend="none",
        enable_two_batch_overlap=False,
        enable_paged_experts=False,
        dwdp_size=1,
        tokenizer_worker_num=1,
        enable_lora=None,
        enable_dp_attention=False,
        enable_torch_compile=False,
        cuda_graph_config=SimpleNamespace(decode=SimpleNamespace(backend=decode_backend)),
    )


def test_a_model_without_experts_is_refused():
    with pytest.raises(ConfigurationError, match="has no routed experts"):
        expert_layout(SimpleNamespace(num_hidden_layers=6, model_type="llama"))
