"""The description of one MoE layer, checked once when the layer is made."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass

from kt_kernel.cpu_share import CpuShare
from kt_kernel.errors import ConfigurationError

# What the inputs of a layer and of its down projection are rounded to before they are multiplied.
ACTIVATIONS = ("auto", "bf16", "int8")

# Where the weights of a layer are: packed into memory of its own, or where their file is mapped.
PACKED, MAPPED = "packed", "mapped"
WEIGHT_STORAGES = (PACKED, MAPPED)


@dataclass(frozen=True)
class LayerConfig:
    """Sizes and limits of one layer, in the words of the public interface.

    `moe_intermediate_size` is the full size, before any split over accelerators. `chunked_prefill_size` is
    the most tokens of one call. `max_deferred_experts_per_token`: see kt_kernel/calls/deferral.py. A
    `swiglu_limit` of 0 does not clamp, a `swiglu_alpha` of 0 is the usual SwiGLU. `activations`: one of
    `ACTIVATIONS`, `weight_storage` of `WEIGHT_STORAGES`. `share`: what of the experts is here, None =
    all; `part` says it in numbers.
    Raises ConfigurationError for values that cannot work.
    """

    layer_idx: int
    num_experts: int
    num_experts_per_tok: int
    hidden_size: int
    moe_intermediate_size: int
    chunked_prefill_size: int
    max_deferred_experts_per_token: int = 0
    swiglu_limit: float = 0.0
    swiglu_alpha: float = 0.0
    activations: str = "auto"
    weight_storage: str = PACKED
    share: CpuShare | None = None

    def __post_init__(self) -> None:
        self._require_integers(0, "layer_idx", "max_deferred_experts_per_token")
        self._require_integers(
            1,
            "num_experts",
            "num_experts_per_tok",
            "hidden_size",
            "moe_intermediate_size",
            "chunked_prefill_size",
        )
        top_k = self.num_experts_per_tok
        if top_k > self.num_experts:
            raise ConfigurationError(
                f"num_experts_per_tok is {top_k}, more than num_experts ({self.num_experts})."
            )
        if self.max_deferred_experts_per_token > top_k:
            raise ConfigurationError(
                f"max_deferred_experts_per_token is {self.max_deferred_experts_per_token}, but a token has "
                f"only {top_k} experts; use at most that."
            )
        for name in ("swiglu_limit", "swiglu_alpha"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ConfigurationError(f"{name} is {value}, expected a finite number >= 0 (0 = off).")
        for name, allowed in (("activations", ACTIVATIONS), ("weight_storage", WEIGHT_STORAGES)):
            if getattr(self, name) not in allowed:
                raise ConfigurationError(
                    f"{name} is {getattr(self, name)!r}, expected one of {', '.join(allowed)}."
                )

        self._check_share()

    @property
    def part(self) -> CpuShare:
        """What of the experts is here."""
        return self.share or CpuShare.everything(self.moe_intermediate_size)

    def _check_share(self) -> None:
        part = self.part
        if part.whole != self.moe_intermediate_size or not part.size:
            raise ConfigurationError(
                f"the share is {part.begin} to {part.end} of {part.whole}, expected a part of "
                f"moe_intermediate_size, {self.moe_intermediate_size}, that is not empty."
            )
        if self.weight_storage == MAPPED and not part.is_whole:
            raise ConfigurationError(
                f"experts that are mapped from their file are computed whole, but the share is {part.size} "
                f"of {part.whole}; pack them, or give one process all."
            )

    def _require_integers(self, least: int, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            try:
                number = operator.index(value)
            except TypeError:
                raise ConfigurationError(f"{name} is {value!r}, expected an integer >= {least}.") from None
            if number < least:
                raise ConfigurationError(f"{name} is {number}, expected an integer >= {least}.")
            object.__setattr__(self, name, number)


class ConfiguredLayer:
    """What a layer says of itself, from its configuration."""

    _config: LayerConfig

    @property
    def layer_idx(self) -> int:
        return self._config.layer_idx

    @property
    def num_experts(self) -> int:
        return self._config.num_experts

    @property
    def num_experts_per_tok(self) -> int:
        return self._config.num_experts_per_tok

    @property
    def hidden_size(self) -> int:
        return self._config.hidden_size

    @property
    def moe_intermediate_size(self) -> int:
        return self._config.moe_intermediate_size

    @property
    def swiglu_limit(self) -> float:
        return self._config.swiglu_limit

    @property
    def share(self) -> CpuShare:
        """What of every expert is here."""
        return self._config.part

    @property
    def chunked_prefill_size(self) -> int:
        return self._config.chunked_prefill_size

    @property
    def max_deferred_experts_per_token(self) -> int:
        return self._config.max_deferred_experts_per_token
