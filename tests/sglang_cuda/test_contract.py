"""What SGLang's CUDA code expects of a layer, for every format and backend of rows.py, on every GPU.

The rows run in one process per GPU: contract.py. A line that reproduces one GPU's:
python -c "import contract; contract.run('9.0')" in this folder, with cuda_code.environment()'s variables.
"""

from __future__ import annotations

import json

import pytest
from rows import EVERY_GPU, ROWS


@pytest.mark.parametrize("capability", EVERY_GPU)
def test_every_format_works_or_is_refused(on_cuda, capability: str):
    printed = on_cuda("contract", "run", capability, timeout=1800)
    outcomes = [json.loads(line) for line in printed.splitlines() if line.startswith("[")]
    assert [place for place, _, _ in outcomes] == list(range(len(ROWS))), printed[-2000:]
    wrong = []
    for place, outcome, what in outcomes:
        row = ROWS[place]
        if outcome != row.expected(capability):
            wrong.append(
                f"{row.format} {row.backend}: {outcome}, expected {row.expected(capability)}: {what}"
            )
        if outcome == "refused":
            assert what.startswith("not available yet: ") and what.endswith("."), what
            assert row.backend in what or "SGLang's" in what, what
            assert row.why and row.why in what, what
    assert not wrong, "\n".join(wrong)


def test_the_table_covers_every_backend_of_ours():
    works = {row.backend for row in ROWS if row.works}
    refused = {row.backend for row in ROWS if row.refused}
    assert {"auto", "triton", "marlin", "cutlass", "flashinfer_cutlass", "flashinfer_mxfp4"} <= works
    assert {"triton_kernel", "flashinfer_trtllm", "flashinfer_trtllm_routed", "flashinfer_cutedsl"} <= refused


def test_the_page_says_what_the_rows_say():
    import device_formats

    page = device_formats.PAGE.read_text(encoding="utf-8")
    assert page == device_formats.with_table(page, device_formats.table()), (
        "run python scripts/device_formats.py"
    )
