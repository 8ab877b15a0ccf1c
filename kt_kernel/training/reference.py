"""ReferenceBackend: the experts of one layer in plain torch, expert by expert, in any float dtype.

The yardstick for the kernels, and what computes formats that they do not train. Sums are in float64 where x
is, else in float32; the order of every sum is fixed.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kt_kernel.adapters.backend import (
    Call,
    ExpertLora,
    ExpertWeights,
    Gradients,
    Needs,
    Saved,
    WeightSource,
)
from kt_kernel.swiglu import Swiglu


class StackedWeights:
    """A `WeightSource` of tensors: gate, up [E, I, H] and down [E, H, I]."""

    def __init__(self, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> None:
        self.gate, self.up, self.down = gate, up, down
        self.num_experts, self.intermediate_size, self.hidden_size = gate.shape

    def expert(self, expert: int) -> ExpertWeights:
        return ExpertWeights(self.gate[expert], self.up[expert], self.down[expert])


class ReferenceBackend:
    """A `Backend` over a `WeightSource`."""

    def __init__(self, weights: WeightSource, swiglu: Swiglu | None = None) -> None:
        self._weights = weights
        self._swiglu = swiglu or Swiglu()
        self.num_experts = weights.num_experts
        self.hidden_size = weights.hidden_size
        self.intermediate_size = weights.intermediate_size

    def forward(self, call: Call, needs: Needs) -> tuple[torch.Tensor, Saved]:
        tokens, k = call.ids.shape
        x, dtype = _wide(call.x), _wide(call.x).dtype
        y = x.new_zeros(tokens * k, self.hidden_size)
        g = u = y.new_zeros(0)
        if needs.any:
            g, u = (x.new_zeros(tokens * k, self.intermediate_size) for _ in range(2))
        for e, pairs in self._rows(call.ids):
            expert = _Expert(self._weights.expert(e), dtype, call, e, pairs)
            rows = x[pairs // k]
            g_rows, u_rows = expert.gate(rows), expert.up(rows)
            y[pairs] = expert.down(self._swiglu(g_rows, u_rows))
            if needs.any:
                g[pairs], u[pairs] = g_rows, u_rows
        out = (call.weights.to(dtype).reshape(-1, 1) * y).view(tokens, k, -1).sum(1)
        return out.to(call.x.dtype), ((g, u) if needs.any else ())

    def backward(self, call: Call, saved: Saved, dout: torch.Tensor, needs: Needs) -> Gradients:
        g, u = saved
        tokens, k = call.ids.shape
        x, dout, dtype = _wide(call.x), _wide(dout), g.dtype
        weights = call.weights.to(dtype).reshape(-1, 1)
        dx, dweights = x.new_zeros(tokens * k, self.hidden_size), x.new_zeros(tokens * k)
        dlora = tuple(map(torch.zeros_like, call.lora.tensors)) if needs.lora and call.lora else ()
        dbase = self._base_gradients(dtype) if needs.base else ()
        for e, pairs in self._rows(call.ids):
            expert = _Expert(self._weights.expert(e), dtype, call, e, pairs)
            rows, dy = x[pairs // k], dout[pairs // k]
            h = self._swiglu(g[pairs], u[pairs])
            dh = expert.down.transposed(dy)  # of y itself, before its weight in the sum of the token
            if needs.weights:
                dweights[pairs] = (dh * h).sum(1) + expert.down.bias_product(dy)
            dg, du = self._swiglu.backward(weights[pairs] * dh, g[pairs], u[pairs])
            if needs.x:
                dx[pairs] = expert.gate.transposed(dg) + expert.up.transposed(du)
            products = ((expert.gate, dg, rows), (expert.up, du, rows), (expert.down, weights[pairs] * dy, h))
            for place, (matrix, d, inputs) in enumerate(products):
                if dlora:
                    da, db = matrix.lora_gradients(d, inputs)
                    dlora[2 * place][e], dlora[2 * place + 1][e] = da, db
                if dbase:
                    dbase[place][e] = d.T @ inputs
        return Gradients(
            dx.view(tokens, k, -1).sum(1).to(call.x.dtype) if needs.x else None,
            dweights.view(tokens, k).to(call.weights.dtype) if needs.weights else None,
            dlora or None,
            dbase or None,
        )

    def _base_gradients(self, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        e, h, i = self.num_experts, self.hidden_size, self.intermediate_size
        return tuple(torch.zeros(shape, dtype=dtype) for shape in ((e, i, h), (e, i, h), (e, h, i)))

    def _rows(self, ids: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """Each expert that has any, with its pairs in ascending order."""
        flat = ids.reshape(-1)
        for e in range(self.num_experts):
            pairs = (flat == e).nonzero().squeeze(1)
            if len(pairs):
                yield e, pairs


class _Expert:
    """The three matrices of expert `e` for the rows of `pairs`."""

    def __init__(
        self, weights: ExpertWeights, dtype: torch.dtype, call: Call, e: int, pairs: torch.Tensor
    ) -> None:
        lora, masks = call.lora, (None, None, None)
        if call.dropout is not None:
            masks = tuple(mask[pairs].to(dtype) * call.dropout.factor for mask in call.dropout.tensors)
        self.gate = _Matrix(weights.gate, weights.gate_bias, _pair(lora, 0, e), masks[0], dtype)
        self.up = _Matrix(weights.up, weights.up_bias, _pair(lora, 1, e), masks[1], dtype)
        self.down = _Matrix(weights.down, weights.down_bias, _pair(lora, 2, e), masks[2], dtype)


class _Matrix:
    """x -> x W^T + bias + s ((x mask) A^T) B^T, and what its backward needs."""

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        lora: tuple[torch.Tensor, torch.Tensor, float] | None,
        mask: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        self._weight = weight.to(dtype)
        self._bias = None if bias is None else bias.to(dtype)
        self._lora = None if lora is None else (lora[0].to(dtype), lora[1].to(dtype), lora[2])
        self._mask = mask

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y = x @ self._weight.T
        if self._bias is not None:
            y = y + self._bias
        if self._lora is not None:
            a, b, scale = self._lora
            y = y + scale * (self._masked(x) @ a.T @ b.T)
        return y

    def transposed(self, dy: torch.Tensor) -> torch.Tensor:
        """The gradient of x."""
        dx = dy @ self._weight
        if self._lora is not None:
            a, b, scale = self._lora
            dx = dx + scale * self._masked(dy @ b @ a)
        return dx

    def bias_product(self, dy: torch.Tensor) -> torch.Tensor | float:
        return 0.0 if self._bias is None else dy @ self._bias

    def lora_gradients(self, dy: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of A and B."""
        assert self._lora is not None
        a, b, scale = self._lora
        inputs = self._masked(x)
        return scale * ((dy @ b).T @ inputs), scale * (dy.T @ (inputs @ a.T))

    def _masked(self, x: torch.Tensor) -> torch.Tensor:
        return x if self._mask is None else x * self._mask


def _pair(lora: ExpertLora | None, place: int, e: int) -> tuple[torch.Tensor, torch.Tensor, float] | None:
    """A and B of the gate (0), up (1) or down (2) projection of expert e, and the scale."""
    if lora is None:
        return None
    a, b = lora.tensors[2 * place : 2 * place + 2]
    return a[e], b[e], lora.scale


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype is torch.float64 else tensor.float()
