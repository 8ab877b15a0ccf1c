"""SftLayer: `KTMoEWrapper(mode="sft")`, one layer that is trained by calls of forward and backward.

The interface that other software is written against, on top of the backend that autograd uses here
(function.py). A forward pass keeps what its own backward pass needs in an object of its own, `SavedCall`;
which one is meant is never guessed.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from kt_kernel.adapters.backend import Call, Dropout, ExpertLora, Needs, Saved
from kt_kernel.adapters.kernel_backend import KernelBackend
from kt_kernel.errors import CallOrderError, ConfigurationError, FeatureUnavailableError, InputError
from kt_kernel.moe import KTMoEWrapper
from kt_kernel.training.sft_methods import sft_method

LORA_NAMES = ("gate_lora_a", "gate_lora_b", "up_lora_a", "up_lora_b", "down_lora_a", "down_lora_b")
_NOTHING = Needs(x=False, weights=False, lora=False)


@dataclass(frozen=True)
class SavedCall:
    """What one forward pass keeps for its backward pass."""

    call: Call
    kept: Saved


class SftLayer:
    """The experts of one layer with a LoRA on gate, up and down of each, and their gradients; on the CPU.

    Arguments are those of KTMoEWrapper, with these of training: `method` is a published name (`AMXBF16_SFT`,
    `INT8_SFT`, `..._SkipLoRA`, sft_methods.py) or one of KTMoEWrapper; `lora_rank`, `lora_alpha` (the LoRA is
    scaled by alpha / rank); `lora_dropout`, element by element from torch's generator while `training` is
    True; `max_cache_depth`, how many forward passes may wait for their backward passes. Raises
    ConfigurationError for values that cannot work, FeatureUnavailableError for experts on a device and
    gradients of the base.
    """

    def __init__(
        self,
        *arguments: Any,
        lora_rank: int = 16,
        lora_alpha: float = 32.0,
        lora_dropout: float = 0.0,
        max_cache_depth: int = 1,
        full_weight_grad: bool = False,
        method: str | None = None,
        **options: Any,
    ) -> None:
        _check(lora_rank, lora_dropout, max_cache_depth)
        if full_weight_grad:
            raise FeatureUnavailableError(
                "full_weight_grad is True, but a layer of mode 'sft' has gradients of its LoRA only; train "
                "the experts themselves with kt_kernel.training."
            )
        if options.get("max_deferred_experts_per_token"):
            raise FeatureUnavailableError(
                f"max_deferred_experts_per_token is {options['max_deferred_experts_per_token']}, but no "
                "expert is deferred in mode 'sft'; leave it out."
            )
        base = sft_method(method)
        self.wrapper = KTMoEWrapper(*arguments, **{**options, "method": base.method})
        if self.wrapper.num_gpu_experts:
            raise FeatureUnavailableError(
                f"{self.wrapper.num_gpu_experts} experts of layer {self.wrapper.layer_idx} are on the "
                "device, but experts are trained on the CPU; leave num_gpu_experts and gpu_experts_mask out."
            )
        self.training = True
        self.lora_rank, self.lora_scale, self.lora_dropout = lora_rank, lora_alpha / lora_rank, lora_dropout
        self.max_cache_depth = max_cache_depth
        self._trains_lora = base.trains_lora
        self._backend: KernelBackend | None = None
        self._weights: tuple[torch.Tensor, ...] = ()
        self._gradients: tuple[torch.Tensor, ...] = ()
        self._waiting: list[SavedCall] = []
        self._forgotten = 0
        self._thread: ThreadPoolExecutor | None = None
        self._submitted: tuple[str, Future] | None = None

    # ---- loading -----------------------------------------------------------------------------

    def load_weights(self, physical_to_logical_map_cpu: torch.Tensor | None = None) -> None:
        """As KTMoEWrapper's."""
        self.discard_saved()
        self.wrapper.load_weights(physical_to_logical_map_cpu)
        self._backend = KernelBackend(self.wrapper)

    def load_weights_from_tensors(
        self,
        gate_proj: torch.Tensor,
        up_proj: torch.Tensor,
        down_proj: torch.Tensor,
        physical_to_logical_map_cpu: torch.Tensor | None = None,
    ) -> None:
        """As KTMoEWrapper's: gate and up [E, I, H], down [E, H, I]."""
        self.discard_saved()
        self.wrapper.load_weights_from_tensors(gate_proj, up_proj, down_proj, physical_to_logical_map_cpu)
        self._backend = KernelBackend(self.wrapper)

    def load_rawint4_weights(self, *arguments: Any, **options: Any) -> None:
        """Raises FeatureUnavailableError, as do load_block_fp8_weights and load_mxfp4_weights: load_weights
        reads the checkpoint at weight_path in the method's own format."""
        raise FeatureUnavailableError(
            f"layer {self.wrapper.layer_idx}: weights of method {self.wrapper.method} are not handed over "
            "as raw tensors; give weight_path and call load_weights."
        )

    load_block_fp8_weights = load_mxfp4_weights = load_rawint4_weights

    def update_base_weights(self) -> None:
        """Raises FeatureUnavailableError: load them again where they have changed."""
        raise FeatureUnavailableError(
            "the experts of a layer of mode 'sft' are not trained, so there is nothing to update; after a "
            "change of your own call load_weights_from_tensors."
        )

    def save_backward_weights_from_tensors(self, *arguments: Any, **options: Any) -> None:
        """Nothing: the backward pass reads the weights of the forward pass."""

    def submit_backward_repack(self, *arguments: Any, **options: Any) -> None:
        """Nothing: the backward pass reads the weights of the forward pass."""

    def wait_backward_repack(self, *arguments: Any, **options: Any) -> None:
        """Nothing: see submit_backward_repack."""

    # ---- the LoRA ----------------------------------------------------------------------------

    def init_lora_weights(
        self,
        gate_lora_a: torch.Tensor,
        gate_lora_b: torch.Tensor,
        up_lora_a: torch.Tensor,
        up_lora_b: torch.Tensor,
        down_lora_a: torch.Tensor,
        down_lora_b: torch.Tensor,
        grad_gate_lora_a: torch.Tensor,
        grad_gate_lora_b: torch.Tensor,
        grad_up_lora_a: torch.Tensor,
        grad_up_lora_b: torch.Tensor,
        grad_down_lora_a: torch.Tensor,
        grad_down_lora_b: torch.Tensor,
    ) -> None:
        """The LoRA and the tensors to which backward adds its gradients; both stay the caller's.

        gate and up: a [E, r, H], b [E, I, r]; down: a [E, r, I], b [E, H, r]; gradients the same. Contiguous,
        on the CPU, float32 or bfloat16 (float32 keeps small updates, and sums of gradients exact). Every
        forward pass reads the present values. Raises InputError.
        """
        weights = (gate_lora_a, gate_lora_b, up_lora_a, up_lora_b, down_lora_a, down_lora_b)
        gradients = (
            grad_gate_lora_a,
            grad_gate_lora_b,
            grad_up_lora_a,
            grad_up_lora_b,
            grad_down_lora_a,
            grad_down_lora_b,
        )
        layer, r = self.wrapper, self.lora_rank
        e, h, i = layer.num_experts, layer.hidden_size, layer.moe_intermediate_size
        shapes = ((e, r, h), (e, i, r), (e, r, h), (e, i, r), (e, r, i), (e, h, r))
        for name, shape, weight, gradient in zip(LORA_NAMES, shapes, weights, gradients, strict=True):
            self._check_tensor(name, shape, weight)
            self._check_tensor(f"grad_{name}", shape, gradient)
        self.discard_saved()
        self._weights, self._gradients = weights, gradients

    def update_lora_weights(self) -> None:
        """Nothing: forward passes read the tensors of init_lora_weights themselves."""

    def release_authoritative_optimizer_grads(self) -> None:
        """Zero the gradients, for the next step of the optimiser."""
        for gradient in self._gradients:
            gradient.detach().zero_()

    def train(self) -> SftLayer:
        """With dropout."""
        self.training = True
        return self

    def eval(self) -> SftLayer:
        """Without dropout; there are gradients all the same."""
        self.training = False
        return self

    # ---- calls -------------------------------------------------------------------------------

    def forward(
        self,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        save_for_backward: bool = True,  # noqa: FBT001, FBT002
        output_device: torch.device | str | None = None,
    ) -> torch.Tensor:
        """The weighted sum of each token's experts with their LoRA, [T, H] like `hidden_states`.

        `hidden_states` [T, H] bf16, f16 or f32; `topk_ids` [T, k] of any integer type, -1 = skip;
        `topk_weights` [T, k]; on any device. The output is on `output_device`, that of the hidden states by
        default. With `save_for_backward`, `last_saved` is what this call keeps for `backward`. Raises
        InputError, or CallOrderError before the weights are loaded.
        """
        backend, call = self._loaded(), self._call(hidden_states, topk_ids, topk_weights)
        output, kept = backend.forward(call, self._needs if save_for_backward else _NOTHING)
        if save_for_backward:
            self._keep(SavedCall(call, kept))
        return output.to(
            hidden_states.device if output_device is None else output_device, hidden_states.dtype
        )

    def backward(
        self,
        grad_output: torch.Tensor,
        output_device: torch.device | str | None = None,
        optimizer_grad_scale: float = 1.0,
        *,
        saved: SavedCall | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(gradient of the hidden states [T, H] like `grad_output`, of the routing weights [T, k] float32).

        Adds the LoRA's gradients, times `optimizer_grad_scale`, to the tensors of init_lora_weights; they are
        those at the LoRA of that forward pass, whatever has changed since. `saved`: which pass, an earlier
        `last_saved`; needed where several wait. Raises CallOrderError if none waits, or several do and
        `saved` is not given; InputError for a gradient that does not fit.
        """
        backend, saved = self._loaded(), self._chosen(saved)
        dout = grad_output.to("cpu", saved.call.x.dtype)
        found = backend.backward(saved.call, saved.kept, dout, self._needs)
        self._waiting = [other for other in self._waiting if other is not saved]
        for total, gradient in zip(self._gradients, found.lora or (), strict=bool(found.lora)):
            total.detach().add_(gradient.to(total.dtype), alpha=optimizer_grad_scale)
        device = grad_output.device if output_device is None else output_device
        assert found.x is not None and found.weights is not None  # they were asked for
        return found.x.to(device, grad_output.dtype), found.weights.to(device)

    @property
    def last_saved(self) -> SavedCall | None:
        """What the latest forward pass keeps; None if no pass waits for its backward pass."""
        return self._waiting[-1] if self._waiting else None

    def discard_saved(self) -> None:
        """Forget all forward passes that wait."""
        self._waiting, self._forgotten = [], 0

    # ---- calls in two halves -----------------------------------------------------------------

    def submit_forward(self, *arguments: Any, **options: Any) -> None:
        """Start `forward`, with its arguments, and return; until `sync_forward` they must not change."""
        self._submit("forward", self.forward, *arguments, **options)

    def sync_forward(self) -> torch.Tensor:
        """The result of `submit_forward`."""
        return self._result("forward")

    def submit_backward_async(self, *arguments: Any, **options: Any) -> None:
        """Start `backward`, with its arguments, and return."""
        self._submit("backward", self.backward, *arguments, **options)

    def sync_backward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The result of `submit_backward_async`."""
        return self._result("backward")

    def submit_forward_inference(
        self, hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
    ) -> None:
        """Start a `forward` that keeps nothing."""
        call = (hidden_states, topk_ids, topk_weights)
        self._submit("inference", self.forward, *call, save_for_backward=False)

    def sync_forward_inference(self, cuda_stream: int | None = None) -> torch.Tensor:
        """The result of `submit_forward_inference`; complete on return, whatever the stream."""
        return self._result("inference")

    # ---- inside ------------------------------------------------------------------------------

    @property
    def _needs(self) -> Needs:
        return Needs(x=True, weights=True, lora=self._trains_lora and bool(self._weights))

    def _loaded(self) -> KernelBackend:
        if self._backend is None:
            raise CallOrderError(
                f"layer {self.wrapper.layer_idx}: the weights are not loaded; call load_weights first."
            )
        return self._backend

    def _call(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Call:
        """Copies of the inputs: what its caller does to its own until the backward pass has no effect."""
        dtype = torch.float32 if hidden.dtype is torch.float16 else hidden.dtype
        x = hidden.detach().to("cpu", dtype, copy=True)
        ids = ids.detach().to("cpu", torch.int64, copy=True)
        weights = weights.detach().to("cpu", torch.float32, copy=True)
        lora = None
        if self._weights:
            copies = [weight.detach().to(torch.float32, copy=True) for weight in self._weights]
            lora = ExpertLora.of(copies, self.lora_scale)
        return Call(x, ids, weights, lora, self._dropout(ids.numel()) if lora else None)

    def _dropout(self, pairs: int) -> Dropout | None:
        if not (self.lora_dropout and self.training):
            return None
        h, i, kept = self.wrapper.hidden_size, self.wrapper.moe_intermediate_size, 1 - self.lora_dropout
        masks = [torch.empty(pairs, width, dtype=torch.bool).bernoulli_(kept) for width in (h, h, i)]
        return Dropout.of(masks, 1 / kept)

    def _keep(self, saved: SavedCall) -> None:
        self._waiting.append(saved)
        if len(self._waiting) > self.max_cache_depth:
            del self._waiting[0]
            self._forgotten += 1

    def _chosen(self, saved: SavedCall | None) -> SavedCall:
        where = f"layer {self.wrapper.layer_idx}: "
        if saved is not None:
            if any(saved is other for other in self._waiting):
                return saved
            raise CallOrderError(
                f"{where}that forward pass had its backward pass, or was forgotten for later ones "
                f"(max_cache_depth is {self.max_cache_depth}); raise max_cache_depth."
            )
        if not self._waiting:
            raise CallOrderError(f"{where}no forward pass waits for its backward pass; call forward first.")
        if len(self._waiting) + self._forgotten > 1:
            raise CallOrderError(
                f"{where}{len(self._waiting) + self._forgotten} forward passes had no backward pass; say "
                "which with saved=, and where there will be none, give save_for_backward=False or call "
                "discard_saved."
            )
        return self._waiting[0]

    def _check_tensor(self, name: str, shape: tuple[int, ...], tensor: torch.Tensor) -> None:
        fits = tensor.is_cpu and tensor.shape == shape and tensor.is_contiguous()
        if not fits or tensor.dtype not in (torch.float32, torch.bfloat16):
            raise InputError(
                f"layer {self.wrapper.layer_idx}: {name} is {tensor.dtype} {list(tensor.shape)} on "
                f"{tensor.device}, expected contiguous float32 or bfloat16 {list(shape)} on the CPU."
            )

    def _submit(self, kind: str, function: Callable, *arguments: Any, **options: Any) -> None:
        if self._submitted is not None:
            raise CallOrderError(
                f"layer {self.wrapper.layer_idx}: a call is on its way; wait for it with its sync function "
                "first."
            )
        self._thread = self._thread or ThreadPoolExecutor(1, thread_name_prefix="kt-sft")
        self._submitted = kind, self._thread.submit(function, *arguments, **options)

    def _result(self, kind: str) -> Any:
        if self._submitted is None or self._submitted[0] != kind:
            what = "no call" if self._submitted is None else f"a call of {self._submitted[0]}"
            raise CallOrderError(
                f"layer {self.wrapper.layer_idx}: {what} is on its way, expected one of {kind}; submit it "
                "first."
            )
        submitted, self._submitted = self._submitted[1], None
        return submitted.result()


def _check(rank: int, dropout: float, depth: int) -> None:
    for value, name, expected, is_right in (
        (rank, "lora_rank", "at least 1", rank >= 1),
        (dropout, "lora_dropout", "a number from 0 to below 1", 0 <= dropout < 1),
        (depth, "max_cache_depth", "at least 1", depth >= 1),
    ):
        if not is_right:
            raise ConfigurationError(f"{name} is {value}, expected {expected}.")
