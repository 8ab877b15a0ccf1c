"""The experts of a loaded layer, written out as a checkpoint has them (doc/formats.md)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kt_kernel import kt_kernel_ext
from kt_kernel.errors import FeatureUnavailableError, InputError
from kt_kernel.formats.expert_image import ExpertEncoding, ExpertTensors
from kt_kernel.formats.matrices import LayerExperts
from kt_kernel.layer_config import LayerConfig


class ExpertCopies:
    """`experts` are what `native` was loaded with, `order` which of them is in each physical slot.

    `global_scales`: float32 [E, 3] by physical slot, factors of all values of gate, up and down.
    """

    def __init__(
        self,
        method: str,
        config: LayerConfig,
        native: kt_kernel_ext.MoeLayer,
        experts: LayerExperts,
        order: list[int],
    ) -> None:
        self._method = method
        self._config = config
        self._native = native
        scale = experts.gate[0].scale
        self._group_size = experts.group_size
        self._scale_dtype = None if scale is None else scale.dtype
        self._biases = experts.biases(order)  # by slot: of gate, up, down; empty without any
        matrices = (experts.gate, experts.up, experts.down)
        self.global_scales = torch.tensor(
            [[row[expert].global_scale for row in matrices] for expert in order], dtype=torch.float32
        )

    def encoding(self, ranks: int) -> ExpertEncoding:
        """See KTMoEWrapper.encoding."""
        self._require_no_biases()
        return self.encoding_of_matrices(ranks)

    def encoding_of_matrices(self, ranks: int) -> ExpertEncoding:
        """See KTMoEWrapper.encoding_of_matrices."""
        config = self._config
        return ExpertEncoding(
            self._method, ranks, config.hidden_size, config.part.size, self._group_size, self._scale_dtype
        )

    def biases_of(self, expert_id: int) -> tuple[torch.Tensor | None, ...]:
        """See KTMoEWrapper.biases."""
        return self._biases[expert_id] if self._biases else (None, None, None)

    def write(self, expert_id: int, shards: Sequence[ExpertTensors]) -> None:
        """See KTMoEWrapper.write_expert."""
        lists = [[_address(shard[part]) for shard in shards] for part in range(4)]
        try:
            self._native.write_expert(expert_id, len(shards), *lists)
        except ValueError as error:
            raise InputError(f"layer {self._config.layer_idx}: {error}") from None
        for shard in shards:
            if shard.global_scales is not None:
                shard.global_scales.copy_(self.global_scales[expert_id])

    def submit(self, expert_id: int, ranks: int, addresses: Sequence[Sequence[int]]) -> None:
        """See KTMoEWrapper.submit_write_weight_scale_to_buffer; `addresses`: its four lists."""
        self._require_no_biases()
        try:
            self._native.submit_write_expert(expert_id, ranks, *map(list, addresses))
        except ValueError as error:
            raise InputError(f"layer {self._config.layer_idx}: {error}") from None

    def _require_no_biases(self) -> None:
        if self._biases:
            raise FeatureUnavailableError(
                f"not available yet: the experts of layer {self._config.layer_idx} have biases, and such "
                "experts are not copied to a device; use no option that moves experts."
            )


def _address(part: torch.Tensor | None) -> int:
    return 0 if part is None else part.data_ptr()
