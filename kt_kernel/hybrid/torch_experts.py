"""Device experts in plain torch, unquantised: for the transformers integration, and for tests on a CPU."""

from __future__ import annotations

import torch
from torch.nn.functional import silu

from kt_kernel.formats.decoding import decode_expert
from kt_kernel.formats.expert_image import ExpertEncoding, ExpertTensors

# Up to here each (token, expert) pair takes its weights by index: no wait for the device, so it can be
# captured. Above, tokens are grouped by expert, which reads each expert once but must know the group sizes.
_MOST_GATHERED_TOKENS = 16


class TorchDeviceExperts:
    """`capacity` slots of w13 [2 I, H] (gate above up) and w2 [H, I], I being one rank's share.

    Sums are float32. `encoding` says what `store` is given. `swiglu_limit` and `swiglu_alpha` mean what they
    mean for KTMoEWrapper.
    """

    def __init__(
        self,
        capacity: int,
        hidden: int,
        intermediate: int,
        dtype: torch.dtype,
        device: torch.device | str,
        encoding: ExpertEncoding | None = None,
        swiglu_limit: float = 0.0,
        swiglu_alpha: float = 0.0,
    ) -> None:
        self.capacity = capacity
        self.w13 = torch.zeros(capacity, 2 * intermediate, hidden, dtype=dtype, device=device)
        self.w2 = torch.zeros(capacity, hidden, intermediate, dtype=dtype, device=device)
        self.bytes_per_expert = 3 * hidden * intermediate * dtype.itemsize
        self.encoding = encoding
        self._limit = swiglu_limit
        self._alpha = swiglu_alpha

    # ---- computing ---------------------------------------------------------------------------

    def compute(self, hidden: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """See DeviceExperts.compute; `hidden` may have another dtype than the weights."""
        tokens = hidden.shape[0]
        output = torch.zeros(tokens, hidden.shape[1], dtype=torch.float32, device=hidden.device)
        if tokens and self.capacity:
            rows = hidden.to(self.w13.dtype)
            if hidden.is_cuda and torch.cuda.is_current_stream_capturing():
                self._add_capturable(output, rows, slots, weights)
            elif hidden.is_cuda and tokens <= _MOST_GATHERED_TOKENS:
                self._add_gathered(output, rows, slots, weights)
            else:
                self._add_grouped(output, rows, slots, weights)
        return output.to(hidden.dtype)

    def _add_capturable(
        self, output: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor
    ) -> None:
        if rows.shape[0] <= _MOST_GATHERED_TOKENS:
            self._add_gathered(output, rows, slots, weights)
        else:
            self._add_every_slot(output, rows, slots, weights)

    def _add_gathered(
        self, output: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor
    ) -> None:
        """One expert of each token at a time: k small batched products."""
        for slot, weight in zip(slots.long().t(), weights.float().t(), strict=True):
            some = slot.clamp(min=0)  # any weights do where the factor is zero
            middle = self._activated(torch.bmm(self.w13[some], rows.unsqueeze(-1)).squeeze(-1))
            result = torch.bmm(self.w2[some], middle.unsqueeze(-1)).squeeze(-1).float()
            output += torch.where(slot[:, None] >= 0, result * weight[:, None], 0)

    def _add_every_slot(
        self, output: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor
    ) -> None:
        """All tokens through all slots, most with the factor zero: what a graph of a large batch can hold."""
        for slot in range(self.capacity):
            here = slots == slot
            factor = torch.where(here, weights.float(), 0).sum(dim=1, keepdim=True)
            result = self._expert(slot, rows).float() * factor
            output += torch.where(here.any(dim=1, keepdim=True), result, 0)

    def _add_grouped(
        self, output: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor
    ) -> None:
        """Each used slot once, with the tokens that chose it."""
        top_k = slots.shape[1]
        flat = slots.reshape(-1).long()
        order = flat.argsort(stable=True)
        # Place 0 counts the pairs that have no slot; this list is the one wait for the device.
        counts = torch.bincount(flat + 1, minlength=self.capacity + 1).tolist()
        factors = weights.float().reshape(-1)
        end = counts[0]
        for slot, count in enumerate(counts[1:]):
            pairs = order[end : end + count]
            end += count
            if count:
                tokens = pairs.div(top_k, rounding_mode="floor")
                result = self._expert(slot, rows[tokens]).float()
                output.index_add_(0, tokens, result.mul_(factors[pairs, None]))

    def _expert(self, slot: int, rows: torch.Tensor) -> torch.Tensor:
        return self._activated(rows @ self.w13[slot].t()) @ self.w2[slot].t()

    def _activated(self, both: torch.Tensor) -> torch.Tensor:
        gate, up = both.float().chunk(2, dim=-1)
        if self._limit:
            gate, up = gate.clamp(max=self._limit), up.clamp(-self._limit, self._limit)
        middle = gate * torch.sigmoid(self._alpha * gate) * (up + 1) if self._alpha else silu(gate) * up
        return middle.to(both.dtype)

    # ---- filling -----------------------------------------------------------------------------

    def places(self, slot: int) -> ExpertTensors | None:
        """See DeviceExperts.places: only bf16 experts in bf16 slots are not decoded."""
        if not self.encoding.is_bf16 or self.w13.dtype != torch.bfloat16:
            return None
        return ExpertTensors(self.w13[slot], None, self.w2[slot], None)

    def store(self, slot: int, tensors: ExpertTensors) -> int:
        """See DeviceExperts.store: the stored bytes cross the bus, and are decoded on the device."""
        w13, w2 = decode_expert(tensors.to(self.w13.device), self.encoding, self.w13.dtype)
        self.w13[slot].copy_(w13)
        self.w2[slot].copy_(w2)
        return self.encoding.bytes

    def takes_slots_of(self, source: TorchDeviceExperts) -> bool:
        """See DeviceExperts.takes_slots_of; all are unquantised."""
        return True

    def copy_slot(self, slot: int, source: TorchDeviceExperts, source_slot: int) -> None:
        """See DeviceExperts.copy_slot."""
        self.w13[slot].copy_(source.w13[source_slot])
        self.w2[slot].copy_(source.w2[source_slot])
