"""The experts of a loaded layer, written out as a checkpoint has them (doc/formats.md)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kt_kernel import kt_kernel_ext
from kt_kernel.errors import FeatureUnavailableError, InputError
from kt_kernel.formats.expert_image import ExpertEncoding, ExpertTensors
from kt_kernel.formats.stored import StoredExperts
from kt_kernel.layer_config import LayerConfig


class ExpertCopies:
    """`stored`: of what `native` was loaded with."""

    def __init__(
        self,
        method: str,
        config: LayerConfig,
        native: kt_kernel_ext.MoeLayer,
        stored: StoredExperts,
    ) -> None:
        self._method = method
        self._config = config
        self._native = native
        self.stored = stored

    def encoding(self, ranks: int) -> ExpertEncoding:
        """See KTMoEWrapper.encoding."""
        self._require_no_biases()
        return self.encoding_of_matrices(ranks)

    def encoding_of_matrices(self, ranks: int) -> ExpertEncoding:
        """See KTMoEWrapper.encoding_of_matrices."""
        config = self._config
        return ExpertEncoding(
            self._method,
            ranks,
            config.hidden_size,
            config.part.size,
            self.stored.group_size,
            self.stored.scale_dtype,
        )

    def biases_of(self, expert_id: int) -> tuple[torch.Tensor | None, ...]:
        """See KTMoEWrapper.biases."""
        return self.stored.biases[expert_id] if self.stored.biases else (None, None, None)

    def write(self, expert_id: int, shards: Sequence[ExpertTensors]) -> None:
        """See KTMoEWrapper.write_expert."""
        lists = [[_address(shard[part]) for shard in shards] for part in range(4)]
        try:
            self._native.write_expert(expert_id, len(shards), *lists)
        except ValueError as error:
            raise InputError(f"layer {self._config.layer_idx}: {error}") from None
        for shard in shards:
            if shard.global_scales is not None:
                shard.global_scales.copy_(self.stored.global_scales[expert_id])

    def submit(self, expert_id: int, ranks: int, addresses: Sequence[Sequence[int]]) -> None:
        """See KTMoEWrapper.submit_write_weight_scale_to_buffer; `addresses`: its four lists."""
        self._require_no_biases()
        try:
            self._native.submit_write_expert(expert_id, ranks, *map(list, addresses))
        except ValueError as error:
            raise InputError(f"layer {self._config.layer_idx}: {error}") from None

    def _require_no_biases(self) -> None:
        if self.stored.biases:
            raise FeatureUnavailableError(
                f"not available yet: the experts of layer {self._config.layer_idx} have biases, and such "
                "experts are not copied to a device; use no option that moves experts."
            )


def _address(part: torch.Tensor | None) -> int:
    return 0 if part is None else part.data_ptr()
