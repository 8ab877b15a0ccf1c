"""Does doc/models.md say what the tests test, and is every miniature what its row says?"""

from __future__ import annotations

import json

import models_page
import pytest
from miniatures import MINIATURES

from kt_kernel import KTMoEWrapper
from kt_kernel.checkpoint.sources import open_experts
from kt_kernel.planning.config_facts import sizes_of_config


def test_the_page_holds_the_table_of_today():
    page = models_page.PAGE.read_text()
    advice = "run: python tests/support/models_page.py"
    assert page == models_page.with_table(page), advice


@pytest.mark.parametrize("name", models_page.LOADED_ALONE)
def test_the_experts_of_a_miniature_are_loaded(name, tmp_path):
    miniature = MINIATURES[name]
    folder = miniature.write(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    assert len(config["architectures"]) == 1
    sizes = sizes_of_config(config)
    layers = open_experts(folder, miniature.method).layer_bytes()
    assert len(layers) == sizes.moe_layers
    for layer in layers:
        experts = (sizes.experts, sizes.top_k, sizes.hidden, sizes.intermediate)
        wrapper = KTMoEWrapper(layer, *experts, cpuinfer_threads=2, threadpool_count=1, weight_path=folder)
        wrapper.load_weights()
        assert wrapper.method == miniature.method
    assert sum(file.stat().st_size for file in folder.iterdir()) < 20 << 20
