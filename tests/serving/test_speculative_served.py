"""Speculative decoding on a machine without a GPU, with a tree of drafts.

The model drafts for itself, so that some drafts are right: one that is accepted against the wrong parent, or
verified with a mask or a place in the cache that is not its own, shows in the tokens after it.
"""

from __future__ import annotations

import pytest
import requests
from agreement import compare, served_continuation
from server import Server, kt_options, serving
from transformers import AutoTokenizer

FAMILY = "mixtral"
STEPS = 3
STARTS = ("The keeper", "Water boils at", "1 2 3 4 5 6 7 8", "We came ashore", "Dear friend,", "def main():")


@pytest.fixture(scope="module")
def server(tiny_checkpoint, own_cache, tmp_path_factory) -> Server:
    model = tiny_checkpoint(FAMILY)
    log = tmp_path_factory.mktemp("server") / "log"
    options = [
        *("--dtype", "float32", "--max-total-tokens", "4096", "--max-running-requests", "8"),
        *("--speculative-algorithm", "STANDALONE", "--speculative-draft-model-path", str(model)),
        *("--speculative-num-steps", str(STEPS), "--speculative-eagle-topk", "2"),
        *("--speculative-num-draft-tokens", "6"),
    ]
    with serving(model, log, *kt_options(model), *options, environment=own_cache) as server:
        yield server


def test_tokens_of_accepted_drafts_are_the_models_tokens(server, tiny_checkpoint, tiny_reference):
    encoded = AutoTokenizer.from_pretrained(tiny_checkpoint(FAMILY))
    answers = [served_continuation(server, encoded(start).input_ids, 40) for start in STARTS]
    agreement = compare(tiny_reference(FAMILY), *answers)
    assert agreement.decided > 150
    assert agreement.holds(), str(agreement)
    report = requests.get(f"{server.url}/server_info", timeout=60).json()
    # 1: no draft was ever accepted. 1.36 on 2026-11-30, low for a model that drafts for itself, and not
    # explained: the bound shows that drafts are accepted at all, not that they are as good as they should be.
    assert report["internal_states"][0]["avg_spec_accept_length"] > 1.2
