"""What requests keep on one rank: keys and values of each token, states of layers with linear attention."""

from __future__ import annotations

from dataclasses import dataclass

from kt_kernel.kv_budget import most_states
from kt_kernel.planning.model_facts import MLA, ModelFacts, Sizes
from kt_kernel.planning.user_options import UserOptions

_STATE_WIDTHS = {"bfloat16": 2, "float16": 2}


def kv_bytes(sizes: Sizes, ranks: int, width: int) -> int:
    """Of one token, with `width` bytes a number. Latent attention keeps the same cache on every rank; the
    heads of keys are shared out.
    """
    sharing = 1 if sizes.attention == MLA else min(ranks, sizes.kv_heads)
    return max(1, width * sizes.kv_values_per_token // sharing)


@dataclass(frozen=True)
class States:
    """`number` of requests' states, and the `bytes` of all; 0 for models without."""

    number: int = 0
    bytes: int = 0


def kept_states(facts: ModelFacts, options: UserOptions, ranks: int, width: int, memory: int) -> States:
    """As asked for, or as many as the server chooses with `memory` bytes. SGLang's pool has one more."""
    matrix_width = _STATE_WIDTHS.get(options.text("--mamba-ssm-dtype") or "", 4)
    per_state = facts.sizes.states.bytes(matrix_width, width) // ranks
    if not per_state:
        return States()
    number = options.integer("--max-mamba-cache-size") or most_states(per_state, memory)
    return States(number, (number + 1) * per_state)
