"""The table of doc/scale.md: what several hosts would give, on paper, from pieces that were measured on one.

    .venv/bin/python bench/scale_table.py --read 400

`--read` is a host's read bandwidth in GB/s. Nothing here has run on more than one machine.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from kt_kernel.planning.measured_shares import LAYER_SECONDS, STEP_SECONDS, SUM_SECONDS, shares_of

_HOSTS = (1, 2, 4, 16)
_STATE_BYTES = 2  # bfloat16
_VARIANT = "avx512_bf16"


@dataclass(frozen=True)
class _Model:
    """`active`: weights that a token uses, and `total` all there are. `expert_bytes`: of one weight in the
    published format; `other_bytes`: of one outside the experts, on one rank and on several.
    """

    name: str
    method: str
    layers: int
    moe_layers: int
    experts: int
    top_k: int
    hidden: int
    intermediate: int
    total: float
    active: float
    expert_bytes: float
    other_bytes: tuple[float, float]

    @property
    def expert_weights(self) -> float:
        return self.moe_layers * self.experts * 3 * self.hidden * self.intermediate

    @property
    def chosen_weights(self) -> float:
        return self.expert_weights * self.top_k / self.experts


MODELS = (
    _Model(
        *("DeepSeek-V3.2", "FP8", 61, 58, 256, 8, 7168, 2048, 671e9, 37e9),
        expert_bytes=1 + 4 / 128**2,
        other_bytes=(1, 2),
    ),
    _Model(
        *("Kimi-K2", "RAWINT4", 61, 60, 384, 8, 7168, 2048, 1026e9, 32e9),
        expert_bytes=0.5 + 2 / 32,
        other_bytes=(2, 2),
    ),
)


def row(model: _Model, ranks: int, stages: int, read: float) -> str:
    """`ranks` hosts share each layer, in `stages`."""
    hosts = ranks * stages
    other_bytes = model.other_bytes[ranks > 1]
    kept = model.expert_weights * model.expert_bytes + (model.total - model.expert_weights) * other_bytes
    parts = {
        "experts": model.chosen_weights
        * model.expert_bytes
        / ranks
        / (read * shares_of(model.method, _VARIANT).read),
        "other weights": (model.active - model.chosen_weights)
        * other_bytes
        / ranks
        / (read * shares_of("BF16", _VARIANT).read),
        "small operators": STEP_SECONDS + model.layers * LAYER_SECONDS,
        # A ring of n ranks takes 2 (n - 1) steps, and 2 were measured with two.
        "sums over the ranks": (2 * model.layers * (ranks - 1) + (stages if stages > 1 else 0)) * SUM_SECONDS,
    }
    state = model.hidden * _STATE_BYTES
    sent = 4 * model.layers / stages * (ranks - 1) / ranks * state + (2 * state if stages > 1 else 0)
    seconds = sum(parts.values())
    bound = max(parts, key=lambda name: parts[name])
    times = ", ".join(f"{1e3 * part:.0f}" for part in parts.values())
    return (
        f"| {model.name} | {hosts} | {ranks} x {stages} | {kept / hosts / 1e9:.0f} | {sent / 1e6:.2f} "
        f"| {times} | {1 / seconds:.1f} | {stages / seconds:.1f} | {bound} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--read", type=float, default=400, help="GB/s of a host")
    read = parser.parse_args().read * 1e9
    print(
        "| model | hosts | ranks x stages | GB a host | MB sent a token | ms: experts, others, small, sums "
        "| one stream, tokens/s | a stream per stage | bound by |\n|---|---|---|---|---|---|---|---|---|"
    )
    for model in MODELS:
        for hosts in _HOSTS:
            for ranks in sorted({1, 2, hosts} & {n for n in range(1, hosts + 1) if hosts % n == 0}):
                print(row(model, ranks, hosts // ranks, read))


if __name__ == "__main__":
    main()
