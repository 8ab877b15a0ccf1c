"""Which layers have experts: a layer counted wrongly would get another layer's weights, or none."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from kt_kernel.errors import ConfigurationError
from kt_kernel.hybrid.layout import expert_layout


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        ({"num_local_experts": 8}, (0, 1, 2, 3, 4, 5)),
        ({"n_routed_experts": 8, "first_k_dense_replace": 3, "moe_layer_freq": 1}, (3, 4, 5)),
        ({"n_routed_experts": 8, "first_k_dense_replace": 1, "moe_layer_freq": 2}, (2, 4)),
        ({"n_routed_experts": 8, "moe_layer_freq": [0, 0, 1, 1, 0, 1]}, (2, 3, 5)),
        ({"num_experts": 8, "decoder_sparse_step": 2, "mlp_only_layers": [3]}, (1, 5)),
        ({"n_routed_experts": 8, "first_k_dense_replace": 3, "num_hash_layers": 3}, (0, 1, 2, 3, 4, 5)),
        ({"n_routed_experts": 8, "first_k_dense_replace": 1, "num_hash_layers": 3}, (0, 1, 2, 3, 4, 5)),
        ({"n_routed_experts": 8, "mlp_layer_types": ["dense"] + ["sparse"] * 5}, (1, 2, 3, 4, 5)),
        (
            {
                "moe_num_experts": 8,
                "moe_layer_start_index": 1,
                "moe_layer_end_index": 4,
                "moe_layer_interval": 1,
            },
            (1, 2, 3, 4),
        ),
        ({"moe_num_experts": 8, "moe_layers_enum": "2,3,5"}, (2, 3, 5)),
        (
            {
                "n_routed_experts": 8,
                "first_k_dense_replace": 2,
                "mlp_layer_types": ["hash_moe"] * 2 + ["moe"] * 4,
            },
            (0, 1, 2, 3, 4, 5),
        ),
    ],
)
def test_the_layers_with_experts_are_found(config, layers):
    layout = expert_layout(SimpleNamespace(num_hidden_layers=6, **config))
    assert (layout.num_layers, layout.num_experts, layout.moe_layers) == (6, 8, layers)


def test_the_text_part_of_a_model_with_pictures_counts():
    text = SimpleNamespace(num_hidden_layers=2, num_experts=4)
    layout = expert_layout(SimpleNamespace(text_config=text, num_hidden_layers=9))
    assert (layout.num_layers, layout.num_experts) == (2, 4)


def test_a_model_without_experts_is_refused():
    with pytest.raises(ConfigurationError, match="has no routed experts"):
        expert_layout(SimpleNamespace(num_hidden_layers=6, model_type="llama"))
