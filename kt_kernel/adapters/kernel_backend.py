"""KernelBackend: the experts of one layer by the kernels of csrc/training/, on the threads of its engine.

Forward multiplies with the activations that the layer serves with (its `activations`), and backward by the
same packed weights: dX needs no second copy of them. Gradients of the LoRA are float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from kt_kernel import kt_kernel_ext
from kt_kernel.adapters.backend import Call, Dropout, ExpertLora, Gradients, Needs, Saved
from kt_kernel.errors import CallOrderError, FeatureUnavailableError, InputError
from kt_kernel.formats.cut import PANEL_COLUMNS
from kt_kernel.moe import KTMoEWrapper

_TYPES = {torch.bfloat16: 0, torch.float32: 2}
_ALIGNMENT = 64  # bytes, of what the kernels read in place


class KernelBackend:
    """A `Backend` over a layer whose weights are loaded; the layer must outlive it, and may serve besides.

    Raises CallOrderError before the weights are loaded. `forward` and `backward` raise InputError for dtypes
    other than bfloat16 and float32 (LoRA and weights: float32), shapes that do not fit the layer, and more
    tokens than its chunked_prefill_size.
    """

    def __init__(self, layer: KTMoEWrapper) -> None:
        if layer.moe is None:
            raise CallOrderError(
                f"layer {layer.layer_idx}: the weights are not loaded; call load_weights first."
            )
        if not layer.share.is_whole:
            raise FeatureUnavailableError(
                f"layer {layer.layer_idx} has {layer.share.size} of {layer.share.whole} rows of its "
                "experts, but experts are trained whole; leave share out."
            )
        self._layer, self._native = layer, layer.moe
        self._clamps = layer.swiglu_limit > 0
        self.num_experts = layer.num_experts
        self.hidden_size = layer.hidden_size
        self.intermediate_size = layer.moe_intermediate_size

    def forward(self, call: Call, needs: Needs) -> tuple[torch.Tensor, Saved]:
        inputs = self._inputs(call)
        saved = self._room(inputs, needs)
        output = torch.empty_like(inputs.x)
        self._run(
            kt_kernel_ext.training_forward,
            **inputs.arguments,
            output=output.data_ptr(),
            saved=_saved_arguments(saved),
        )
        return output, (saved if needs.any else ())

    def backward(self, call: Call, saved: Saved, dout: torch.Tensor, needs: Needs) -> Gradients:
        inputs = self._inputs(call)
        if dout.shape != inputs.x.shape or dout.dtype is not inputs.x.dtype:
            raise InputError(
                f"layer {self._layer.layer_idx}: the output's gradient is {dout.dtype} {list(dout.shape)}, "
                f"expected {inputs.x.dtype} {list(inputs.x.shape)} like the hidden states."
            )
        dout = dout.contiguous()
        dx = torch.empty_like(inputs.x) if needs.x else None
        dweights = torch.zeros_like(inputs.weights) if needs.weights else None
        lora = None
        if needs.lora and call.lora is not None:
            lora = tuple(torch.zeros_like(t) for t in call.lora.tensors)
        e, h, i = self.num_experts, self.hidden_size, self.intermediate_size
        base = None
        if needs.base:
            base = tuple(
                torch.zeros(sizes, dtype=torch.float32) for sizes in ((e, i, h), (e, i, h), (e, h, i))
            )
        self._run(
            kt_kernel_ext.training_backward,
            **inputs.arguments,
            saved=_saved_arguments(saved),
            output_gradient=dout.data_ptr(),
            hidden_gradient=_address(dx),
            weight_gradient=_address(dweights),
            lora_gradients=None if lora is None else [t.data_ptr() for t in lora],
            base_gradients=[] if base is None else [t.data_ptr() for t in base],
        )
        return Gradients(dx, dweights, lora, base)

    def _run(self, function: Callable[..., None], **arguments: object) -> None:
        try:
            function(self._native, **arguments)
        except ValueError as error:
            raise InputError(f"layer {self._layer.layer_idx}: {error}") from None

    def _inputs(self, call: Call) -> _Inputs:
        self._check(call)
        ids = call.ids.to(torch.int64)
        ids = ids.masked_fill((ids < 0) | (ids >= self.num_experts), -1).contiguous()
        return _Inputs(_aligned(call.x), ids, call.weights.contiguous(), call.lora, call.dropout)

    def _check(self, call: Call) -> None:
        x, where = call.x, f"layer {self._layer.layer_idx}: "
        if x.dtype not in _TYPES:
            raise InputError(f"{where}hidden states are {x.dtype}, expected bfloat16 or float32.")
        if x.dim() != 2 or x.shape[1] != self.hidden_size:
            raise InputError(f"{where}hidden states are {list(x.shape)}, expected [T, {self.hidden_size}].")
        if call.ids.shape != call.weights.shape or call.ids.dim() != 2 or len(call.ids) != len(x):
            raise InputError(
                f"{where}ids are {list(call.ids.shape)} and weights {list(call.weights.shape)}, expected "
                f"[{len(x)}, k] both."
            )
        if call.weights.dtype is not torch.float32:
            raise InputError(f"{where}weights are {call.weights.dtype}, expected float32.")
        if call.lora is not None:
            self._check_lora(call.lora, where)
        if call.dropout is not None:
            self._check_dropout(call.dropout, call.ids.numel(), where)

    def _check_lora(self, lora: ExpertLora, where: str) -> None:
        e, r, h, i = self.num_experts, lora.rank, self.hidden_size, self.intermediate_size
        shapes = ((e, r, h), (e, i, r), (e, r, h), (e, i, r), (e, r, i), (e, h, r))
        for tensor, shape in zip(lora.tensors, shapes, strict=True):
            fits = tensor.shape == shape and tensor.dtype is torch.float32 and tensor.is_contiguous()
            if not fits:
                raise InputError(
                    f"{where}a LoRA tensor is {tensor.dtype} {list(tensor.shape)}, expected contiguous "
                    f"float32 {list(shape)}."
                )

    def _check_dropout(self, dropout: Dropout, pairs: int, where: str) -> None:
        widths = (self.hidden_size, self.hidden_size, self.intermediate_size)
        for mask, width in zip(dropout.tensors, widths, strict=True):
            if mask.dtype is not torch.bool or mask.shape != (pairs, width) or not mask.is_contiguous():
                raise InputError(
                    f"{where}a mask of dropout is {mask.dtype} {list(mask.shape)}, expected contiguous bool "
                    f"{[pairs, width]}."
                )

    def _room(self, inputs: _Inputs, needs: Needs) -> Saved:
        """Gate and up, in the dtype of x, and the LoRA's products of A; empty where they are not needed."""
        pairs = max(1, int((inputs.ids >= 0).sum()))  # an empty tensor has no address
        # What gate and up are saved with has whole panels of columns.
        columns = -(-self.intermediate_size // PANEL_COLUMNS) * PANEL_COLUMNS
        # bf16 would move numbers onto a clamp's limit, where they have a gradient.
        dtype = torch.float32 if self._clamps else inputs.x.dtype
        rows = (pairs, columns) if needs.any else (0,)
        projected = (0,) if inputs.lora is None else (3, pairs, inputs.lora.rank)
        return (
            torch.empty(rows, dtype=dtype),
            torch.empty(rows, dtype=dtype),
            torch.empty(projected, dtype=torch.float32),
        )


@dataclass(frozen=True)
class _Inputs:
    """The tensors of a call as the kernels take them; ids to skip are -1."""

    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    lora: ExpertLora | None
    dropout: Dropout | None

    @property
    def arguments(self) -> dict[str, object]:
        tokens, k = self.ids.shape
        return {
            "tokens": tokens,
            "top_k": k,
            "dtype": _TYPES[self.x.dtype],
            "hidden": self.x.data_ptr(),
            "ids": self.ids.data_ptr(),
            "weights": self.weights.data_ptr(),
            "lora": self._lora_arguments(),
        }

    def _lora_arguments(self) -> tuple[list[int], int, float, list[int]] | None:
        lora, dropout = self.lora, self.dropout
        if lora is None:
            return None
        factor = 1.0 if dropout is None else dropout.factor
        kept = [] if dropout is None else [mask.data_ptr() for mask in dropout.tensors]
        return [t.data_ptr() for t in lora.tensors], lora.rank, lora.scale * factor, kept


def _saved_arguments(saved: Saved) -> tuple[int, int, int, int]:
    gate, up, projected = saved
    return gate.data_ptr(), up.data_ptr(), _TYPES[gate.dtype], projected.data_ptr()


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _aligned(x: torch.Tensor) -> torch.Tensor:
    x = x.contiguous()
    return x if x.data_ptr() % _ALIGNMENT == 0 else x.clone()
