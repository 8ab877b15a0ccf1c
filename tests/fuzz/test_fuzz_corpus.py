"""Files and flags that a fuzzer found, and damage of a fixed seed: read, or refused in one line.

The fuzzer itself runs by hand: scripts/fuzz.sh.
"""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest
from fuzz_targets import SEEDS, TARGETS, check

CORPUS = Path(__file__).parent / "corpus"
DAMAGED = 150  # for each target; a few seconds for all


@pytest.mark.parametrize("target", sorted(folder.name for folder in CORPUS.iterdir()))
def test_what_the_fuzzer_found_is_read_or_refused(target):
    files = sorted((CORPUS / target).glob("*"))
    assert files and target in TARGETS
    for file in files:
        check(target, file.read_bytes())


@pytest.mark.parametrize("target", TARGETS)
def test_damage_is_read_or_refused(target):
    seeds = SEEDS[target]()
    outcomes = Counter(check(target, seed) for seed in seeds)
    assert outcomes["read"] >= 1
    for number in range(DAMAGED):
        outcomes[check(target, damaged(random.Random(number), seeds))] += 1
    assert outcomes.total() - outcomes["read"] > DAMAGED / 10, outcomes


def damaged(choices: random.Random, seeds: list[bytes]) -> bytes:
    data = bytearray(choices.choice(seeds))
    for _ in range(choices.choice((1, 1, 2, 4))):
        at = choices.randrange(len(data))
        kind = choices.randrange(4)
        if kind == 0:
            data[at] ^= 1 << choices.randrange(8)
        elif kind == 1:
            del data[at : at + choices.choice((1, 4, 30))]
        elif kind == 2:
            piece = choices.choice((b"null", b"-1", b"1e999", b"[]", b"{}", b"9" * 30, b'"', b"\xff" * 8))
            data[at : at + choices.choice((0, len(piece)))] = piece
        else:
            data[at:at] = data[at : at + choices.choice((1, 8, 60))]
        if not data:
            return b""
    return bytes(data)
