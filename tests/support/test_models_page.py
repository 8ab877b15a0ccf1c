"""Does doc/models.md say what the tests test, and is every miniature what its row says?"""

from __future__ import annotations

import json

import models_page
import pytest
from miniatures import MINIATURES

from kt_kernel import detect_method

# One of each way to name and to pack experts; the others are read by the tests of their path.
SAMPLE = ("gpt-oss-20b", "gpt-oss-bf16", "kimi-k3-experts", "hunyuan-a13b", "kimi-k2.5")


def test_the_page_holds_the_table_of_today():
    page = models_page.PAGE.read_text()
    advice = "run: python tests/support/models_page.py"
    assert page == models_page.with_table(page), advice


@pytest.mark.parametrize("name", SAMPLE)
def test_a_miniature_is_a_checkpoint_of_its_method(name, tmp_path):
    miniature = MINIATURES[name]
    folder = miniature.write(tmp_path / "model")
    assert detect_method(folder) == miniature.method
    config = json.loads((folder / "config.json").read_text())
    assert len(config["architectures"]) == 1
    assert sum(file.stat().st_size for file in folder.iterdir()) < 20 << 20
