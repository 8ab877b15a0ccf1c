"""The table of doc/models.md: which miniature takes which path in the tests.

python tests/support/models_page.py      write it into the page
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path += [str(Path(__file__).resolve().parents[1] / folder) for folder in ("serving", "transformers")]

import test_families
import test_other_families
import test_quantised
import tiny_models
import tiny_quantised
from miniatures import MINIATURES, Miniature

PAGE = Path(__file__).resolve().parents[2] / "doc" / "models.md"
BEGIN = "<!-- models: written by tests/support/models_page.py -->"
END = "<!-- end of models -->"

# What tests/serving starts a server for, in test_model_families.py, test_weight_formats.py and others.
_SERVED = {
    *tiny_models.FAMILIES,
    *tiny_quantised.SERVED,
    "qwen3_next",
    "qwen3_5_moe",
    "gpt-oss",
    "gpt_oss",
    *test_other_families.FAMILIES,
}
_IN_TRANSFORMERS = {
    *(*test_families.FAMILIES, *test_families.OTHERS),
    *(*test_quantised.LAYOUTS, *test_quantised.ON_CPU),
}
# Not served, as servers of the same path are.
_SERVED_AS = {"qwen3-fp8": "as Qwen3, DeepSeek-V3", "kimi-k2-instruct": "as DeepSeek-V3"}
# Loaded by test_models_page.py: what nothing else loads, and one of each way to name and to pack experts.
LOADED_ALONE = (
    *("glm-5", "kimi-linear", "kimi-k2-instruct", "kimi-k2.5"),
    *("gpt-oss-20b", "gpt-oss-bf16", "kimi-k3-experts", "hunyuan-a13b"),
)
# Layouts whose experts the tests of SGLang's CUDA code (tests/sglang_cuda) do not put on a device.
_NOT_ON_A_DEVICE = {"compressed-mxfp4"}


def table() -> str:
    lines = [
        "| like | experts | loads | SGLang on a CPU | transformers | SGLang on CUDA |",
        "|---|---|---|---|---|---|",
    ]
    return "\n".join(lines + [_row(miniature) for miniature in MINIATURES.values()])


def _row(miniature: Miniature) -> str:
    source = miniature.source
    served, in_transformers = source in _SERVED, source in _IN_TRANSFORMERS
    loaded = served or in_transformers or miniature.name in LOADED_ALONE
    cells = (
        miniature.like,
        f"`{miniature.method}`",
        "tested" if loaded else "not tested",
        "tested" if served else _SERVED_AS.get(source, "not tested"),
        "tested" if in_transformers else "not tested",
        "by contract test" if served and source not in _NOT_ON_A_DEVICE else "not tested",
    )
    return f"| {' | '.join(cells)} |"


def with_table(page: str) -> str:
    """`page` with the table of today; raises ValueError without the two marks."""
    head, tail = page.index(BEGIN) + len(BEGIN), page.index(END)
    return f"{page[:head]}\n\n{table()}\n\n{page[tail:]}"


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text()))
