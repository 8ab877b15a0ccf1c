"""The ways in which a hybrid model can be served, in few rows: each two values of different columns meet in
one of them.

The prompt lengths around the threshold need no rows of their own: a server with one is asked with prompts
just below it, at it, and above.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import tiny_models
import torch
from server import kt_options

from kt_kernel.hybrid.layout import ExpertLayout

THRESHOLD = 40
UPDATE_INTERVAL = 3
NONE, ONE, SOME, ALL = "none", "one", "some", "all"
_SHARES = {NONE: 0.0, SOME: 0.3, ALL: 1.0}


@dataclass(frozen=True)
class Regime:
    """`experts`: how many live on the device: none, one of each layer, 30 % at odd places, or all."""

    family: str
    experts: str
    strategy: str
    deferral: int
    threshold: int
    update: bool
    misses: str

    def __str__(self) -> str:
        return "-".join(str(getattr(self, field.name)) for field in fields(self))

    @property
    def is_plain(self) -> bool:
        """Does every expert stay where it is, whatever is asked?"""
        return not (self.threshold or self.update or self.misses == "auto")

    def options(self, model: Path, layout: ExpertLayout, counts: Path) -> list[str]:
        """The server's options; `counts` is where statistics may be written."""
        options = kt_options(model)
        if self.experts == ONE:
            options += ["--kt-num-gpu-experts", "1"]
        else:
            options += ["--kt-gpu-experts-ratio", str(_SHARES[self.experts])]
        options += ["--kt-expert-placement-strategy", self.strategy]
        if self.strategy == "frequency":
            torch.manual_seed(0)
            uses = torch.randint(1, 1000, (3, layout.num_layers, layout.num_experts))
            torch.save({"logical_count": uses}, counts)
            options += ["--init-expert-location", str(counts)]
        options += ["--kt-max-deferred-experts-per-token", str(self.deferral)]
        options += ["--kt-gpu-prefill-token-threshold", str(self.threshold)]
        options += ["--kt-miss-policy", self.misses]
        if self.update:
            options += ["--kt-enable-dynamic-expert-update"]
            options += ["--kt-expert-update-interval", str(UPDATE_INTERVAL)]
        return options

    def device_experts(self, layout: ExpertLayout) -> int:
        """Of the whole model."""
        if self.experts == ONE:
            return len(layout.moe_layers)
        return int(layout.num_experts * len(layout.moe_layers) * _SHARES[self.experts])


# Mixtral's rows do not defer: with two experts per token, hundreds of tokens do not protect them all.
REGIMES = (
    Regime("deepseek_v3", ALL, "uniform", 1, 0, True, "auto"),
    Regime("deepseek_v3", NONE, "front-loading", 0, THRESHOLD, True, "cpu"),
    Regime("deepseek_v3", ONE, "frequency", 0, THRESHOLD, False, "auto"),
    Regime("deepseek_v3", ONE, "uniform", 2, THRESHOLD, False, "cpu"),
    Regime("deepseek_v3", SOME, "front-loading", 2, THRESHOLD, False, "cpu"),
    Regime("glm4_moe", NONE, "uniform", 2, 0, False, "cpu"),
    Regime("glm4_moe", ONE, "random", 0, 0, True, "cpu"),
    Regime("glm4_moe", SOME, "frequency", 1, THRESHOLD, False, "cpu"),
    Regime("mixtral", NONE, "random", 0, THRESHOLD, True, "auto"),
    Regime("mixtral", SOME, "uniform", 0, 0, False, "cpu"),
    Regime("qwen2_moe", ALL, "frequency", 1, THRESHOLD, False, "auto"),
    Regime("qwen2_moe", ALL, "front-loading", 0, THRESHOLD, False, "cpu"),
    Regime("qwen2_moe", NONE, "frequency", 2, 0, True, "auto"),
    Regime("qwen2_moe", ONE, "front-loading", 1, 0, False, "cpu"),
    Regime("qwen2_moe", SOME, "random", 1, THRESHOLD, True, "auto"),
    Regime("qwen3_moe", ALL, "random", 2, THRESHOLD, False, "auto"),
    Regime("qwen3_moe", NONE, "front-loading", 1, 0, False, "auto"),
    Regime("qwen3_moe", SOME, "random", 1, 0, False, "auto"),
    Regime("qwen3_moe", SOME, "uniform", 0, THRESHOLD, True, "auto"),
)

COLUMNS = {
    "experts": (NONE, ONE, SOME, ALL),
    "strategy": ("uniform", "front-loading", "random", "frequency"),
    "deferral": (0, 1, 2),
    "threshold": (0, THRESHOLD),
    "update": (False, True),
    "misses": ("cpu", "auto"),
}


def missing_pairs() -> Iterator[str]:
    """Pairs of values, and families without an all-CPU, a split or an undeferred row, that no row has."""
    for (one, values), (other, others) in itertools.combinations(COLUMNS.items(), 2):
        for pair in itertools.product(values, others):
            if all((getattr(row, one), getattr(row, other)) != pair for row in REGIMES):
                yield f"{one}={pair[0]} with {other}={pair[1]}"
    for family in tiny_models.FAMILIES:
        rows = [row for row in REGIMES if row.family == family]
        for what, is_there in (
            ("all on the CPU", any(row.experts == NONE for row in rows)),
            ("split", any(row.experts == SOME for row in rows)),
            ("without deferral", any(row.deferral == 0 for row in rows)),
        ):
            if not is_there:
                yield f"{family} {what}"
