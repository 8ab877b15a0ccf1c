"""A small model around the hybrid engine, and the same in plain float64 torch with the rules spelled out.

    decoder layers   0 MoE   1 MoE   2 dense   3 MoE   4 MoE

A pass takes the tokens of a chunk and continues from the state of the passes before: instead of attention, a
row sees the running mean of all rows up to it. The router looks at the tokens alone, in float64, so both
models choose the same experts though their sums are rounded differently. What the engine's CPU ran is written
down, for comparison with what `Reference` says from the placements alone.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from api_support import random_experts
from format_support import decoded

from kt_kernel import KTMoEWrapper
from kt_kernel.cpu_share import CpuShare
from kt_kernel.formats.quantize.experts import quantize_experts
from kt_kernel.hybrid.layer import HybridLayer
from kt_kernel.hybrid.model import HybridModel
from kt_kernel.hybrid.options import HybridOptions
from kt_kernel.hybrid.ranks import ALONE, Ranks
from kt_kernel.hybrid.slots import LayerPlacement, Placement
from kt_kernel.hybrid.torch_experts import TorchDeviceExperts
from kt_kernel.hybrid.update import BackgroundUpdater

EXPERTS, TOP_K, HIDDEN, INTERMEDIATE, VOCABULARY = 8, 3, 64, 32, 40
DECODER_LAYERS, MOE_LAYERS = 5, (0, 1, 3, 4)
PROMPT, ANSWER = 10, 6
NONE_DEFERRED = 0

Skips = Sequence[frozenset[int]]


def all_zero_masks() -> torch.Tensor:
    return torch.zeros(DECODER_LAYERS, EXPERTS, dtype=torch.bool)


# ---- weights -------------------------------------------------------------------------------------


@cache
def expert_weights(layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """bf16 gate, up [E, I, H] and down [E, H, I]."""
    return random_experts(300 + layer, EXPERTS, HIDDEN, INTERMEDIATE)


@cache
def dense_weights() -> dict[str, torch.Tensor]:
    """Values that bf16 holds exactly, so that float32 and float64 models have the same ones."""
    generator = torch.Generator().manual_seed(7)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) / columns**0.5).bfloat16().double()

    weights = {"embedding": matrix(VOCABULARY, HIDDEN) * HIDDEN**0.5, "head": matrix(VOCABULARY, HIDDEN)}
    for layer in range(DECODER_LAYERS):
        weights[f"mix{layer}"] = matrix(HIDDEN, HIDDEN)
        weights[f"router{layer}"] = matrix(EXPERTS, HIDDEN) / 3
        weights[f"dense{layer}"] = matrix(HIDDEN, HIDDEN)
    return weights


def normalised(rows: torch.Tensor) -> torch.Tensor:
    return rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + 1e-6)


# ---- the model, with its experts left open -------------------------------------------------------

Experts = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Decoder:
    """Everything but the experts; `experts(layer, rows, ids, weights)` gives their sum."""

    def __init__(self, experts: Experts, dtype: torch.dtype) -> None:
        self._experts = experts
        self._weights = {name: weight.to(dtype) for name, weight in dense_weights().items()}
        self._sums = [torch.zeros(HIDDEN, dtype=dtype) for _ in range(DECODER_LAYERS)]
        self._embedding_sums = torch.zeros(HIDDEN, dtype=torch.float64)
        self._tokens = 0

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits [rows, vocabulary] of one chunk."""
        rows = self._weights["embedding"][tokens]
        embedding_sums = rows.double().cumsum(0) + self._embedding_sums
        self._embedding_sums = embedding_sums[-1]
        routed_by = rows.double() + embedding_sums / 4
        counts = torch.arange(1, len(tokens) + 1)[:, None] + self._tokens
        for layer in range(DECODER_LAYERS):
            sums = rows.cumsum(0) + self._sums[layer]
            self._sums[layer] = sums[-1]
            rows = rows + (sums / counts) @ self._weights[f"mix{layer}"]
            inner = normalised(rows)
            if layer in MOE_LAYERS:
                rows = rows + self._moe(layer, inner, routed_by)
            else:
                rows = rows + inner @ self._weights[f"dense{layer}"]
        self._tokens += len(tokens)
        return normalised(rows) @ self._weights["head"].t()

    def _moe(self, layer: int, rows: torch.Tensor, routed_by: torch.Tensor) -> torch.Tensor:
        scores = (routed_by @ dense_weights()[f"router{layer}"].t()).softmax(-1)
        weights, ids = scores.topk(TOP_K)
        return self._experts(layer, rows, ids, weights.to(rows.dtype))


def answer(decoder: Decoder, prompt: torch.Tensor, tokens: int, before_pass: Callable[[], None]) -> Answer:
    """The prompt in one pass, then greedy tokens one by one; `before_pass()` runs before each."""
    result = Answer()
    chunk = prompt
    for _ in range(tokens):
        before_pass()
        logits = decoder.forward(chunk)
        result.logits.append(logits)
        best = logits[-1].topk(2)
        result.margin = min(result.margin, float(best.values[0] - best.values[1]))
        result.tokens.append(int(best.indices[0]))
        chunk = best.indices[:1]
    return result


@dataclass
class Answer:
    tokens: list[int] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)
    margin: float = float("inf")  # between the best and the second best token, the closest of all


def prompt(seed: int, length: int = PROMPT) -> torch.Tensor:
    return torch.randint(VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed))


# bf16 activations inside the CPU's experts, through five layers and a head.
_NMSE_BOUND = 1e-4


def assert_close(actual: torch.Tensor, expected: torch.Tensor, where: str = "") -> None:
    error = float((actual.double() - expected).square().sum() / expected.square().sum())
    assert error <= _NMSE_BOUND, f"{where}: NMSE {error:.2e} is above {_NMSE_BOUND:.0e}"


# ---- with the engine -----------------------------------------------------------------------------


@dataclass(frozen=True)
class CpuRun:
    """One task of the CPU: the experts of `layer` that it ran, [rows, k], -1 = skipped."""

    layer: int
    ids: tuple[tuple[int, ...], ...]


class _Spy:
    """Stands before the extension's layer object and writes down the ids of every task."""

    def __init__(self, native: Any, layer: int, log: list[CpuRun]) -> None:
        self._native, self._layer, self._log = native, layer, log

    def submit(self, tokens: int, top_k: int, *rest: Any) -> None:
        self._note(tokens, top_k, *rest)
        self._native.submit(tokens, top_k, *rest)

    def forward(self, tokens: int, top_k: int, *rest: Any) -> None:
        self._note(tokens, top_k, *rest)
        self._native.forward(tokens, top_k, *rest)

    def _note(self, tokens: int, top_k: int, hidden: int, code: int, ids: int, id_code: int, *_: Any) -> None:
        kind = ctypes.c_int64 if id_code else ctypes.c_int32
        flat = list((kind * (tokens * top_k)).from_address(ids))
        rows = tuple(tuple(flat[row * top_k : (row + 1) * top_k]) for row in range(tokens))
        self._log.append(CpuRun(self._layer, rows))


@cache
def wrappers(
    max_deferred: int, method: str = "BF16", share: CpuShare | None = None
) -> dict[int, KTMoEWrapper]:
    """The CPU's experts of each MoE layer, or this share of them; layers with another `max_deferred` are
    another model.
    """
    made = {}
    for layer in MOE_LAYERS:
        made[layer] = KTMoEWrapper(
            layer_idx=layer,
            num_experts=EXPERTS,
            num_experts_per_tok=TOP_K,
            hidden_size=HIDDEN,
            moe_intermediate_size=INTERMEDIATE,
            cpuinfer_threads=2,
            threadpool_count=1,
            weight_path=f"hybrid-{max_deferred}-{method}",
            chunked_prefill_size=64,
            max_deferred_experts_per_token=max_deferred,
            method=method,
            activations="bf16",
            share=share,
        )
        made[layer].load_weights_from_tensors(*expert_weights(layer))
    return made


class Engine:
    """The engine's layers over `wrappers(max_deferred)`, with device experts in plain torch on the CPU.

    With `readers` of ALONE each rank has its device's share of the CPU's experts, else rank 0 all of them.
    `masks` bool [decoder layers, E]. `cpu_runs` grows by one entry for each task of the CPU.
    """

    def __init__(
        self,
        masks: torch.Tensor,
        options: HybridOptions,
        max_deferred: int = NONE_DEFERRED,
        method: str = "BF16",
        device_experts: type = TorchDeviceExperts,
        ranks: Ranks = ALONE,
        readers: Ranks | None = None,
    ) -> None:
        self.model = HybridModel(options, ranks, readers=readers)
        readers = self.model.context.readers
        shares = ranks.size // readers.size
        width = INTERMEDIATE // shares
        first = width * ranks.rank if shares > 1 else 0
        share = CpuShare(first, first + width, INTERMEDIATE)
        self.cpu_runs: list[CpuRun] = []
        self.layers: dict[int, HybridLayer] = {}
        self._natives = {}
        loaded = wrappers(max_deferred, method, share) if readers.rank == 0 else dict.fromkeys(MOE_LAYERS)
        for index, wrapper in loaded.items():
            encoding = readers.broadcast(None if wrapper is None else wrapper.encoding(readers.size))

            def room(count: int, encoding=encoding) -> TorchDeviceExperts:
                return device_experts(count, HIDDEN, encoding.share, torch.float32, "cpu", encoding)

            placement = LayerPlacement(Placement.initial(masks[index]))
            resident = room(placement.current.capacity) if placement.current.capacity else None
            layer = HybridLayer(index, wrapper, resident, placement, room, self.model)
            if resident is not None:
                layer.load_residents()
            self.layers[index] = layer
            if wrapper is not None:
                self._natives[index] = wrapper._cpu._native
                wrapper._cpu._native = _Spy(wrapper._cpu._native, index, self.cpu_runs)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.model.close()
        for index, native in self._natives.items():
            self.layers[index].wrapper._cpu._native = native

    def decoder(self, all_reduce: Callable[[torch.Tensor], None] = lambda partial_sum: None) -> Decoder:
        """`all_reduce` adds up the partial sums of the ranks, in place."""

        def experts(index: int, rows: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            before = rows.clone(), ids.clone(), weights.clone()
            output = self.layers[index].forward(rows, ids, weights)
            for tensor, old in zip((rows, ids, weights), before, strict=True):
                assert torch.equal(tensor, old), "forward changed a tensor that it was given"
            all_reduce(output)
            return output

        return Decoder(experts, torch.float32)

    def placements(self) -> dict[int, frozenset[int]]:
        return {index: frozenset(layer.placement.current.experts) for index, layer in self.layers.items()}


# ---- the same in float64, with the rules spelled out ---------------------------------------------


def split(
    ids: torch.Tensor, weights: torch.Tensor, protected_k: int
) -> tuple[list[list[int]], list[list[int]]]:
    """(now, later): an expert among the `protected_k` heaviest of any row runs now in all rows."""
    protected = set()
    for row_ids, row_weights in zip(ids.tolist(), weights.tolist(), strict=True):
        ranked = sorted(range(len(row_ids)), key=lambda place: -row_weights[place])
        protected |= {row_ids[place] for place in ranked[:protected_k]}
    now = [[expert if expert in protected else -1 for expert in row] for row in ids.tolist()]
    later = [[-1 if expert in protected else expert for expert in row] for row in ids.tolist()]
    return now, later


def without(rows: list[list[int]], skipped: frozenset[int]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(-1 if expert in skipped else expert for expert in row) for row in rows)


class Reference:
    """The experts of the model in float64, and the rules of the engine without any of its machinery.

    `on_device` is set before each pass: for each MoE layer the experts that have a slot. `prefilled`: the
    layers that calls of `threshold` rows run on the device.
    """

    def __init__(self, max_deferred: int = NONE_DEFERRED, threshold: int = 0, method: str = "BF16") -> None:
        self.on_device: dict[int, frozenset[int]] = dict.fromkeys(MOE_LAYERS, frozenset())
        self.prefilled: Sequence[int] = MOE_LAYERS
        self.cpu_runs: list[CpuRun] = []
        self._max_deferred = max_deferred
        self._threshold = threshold
        self._method = method
        self._waiting: torch.Tensor | None = None

    def decoder(self) -> Decoder:
        return Decoder(self._experts, torch.float64)

    def _experts(
        self, layer: int, rows: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        resident = self.on_device[layer]
        now, later = ids.tolist(), None
        prefilled = 0 < self._threshold <= len(rows) and layer in self.prefilled
        if len(resident) == EXPERTS or prefilled:
            resident = frozenset(range(EXPERTS))
        elif self._max_deferred and self._adds_deferred(layer + 1):
            now, later = split(ids, weights, TOP_K - self._max_deferred)
        if len(resident) < EXPERTS:
            self.cpu_runs.append(CpuRun(layer, without(now, resident)))
        # What has a slot runs now, wherever the ranking put it.
        everything = ids.tolist()
        now = [
            [e if e == kept or e in resident else -1 for e, kept in zip(row, kept_row, strict=True)]
            for row, kept_row in zip(everything, now, strict=True)
        ]
        output = self._sum(layer, rows, now, weights)
        if self._waiting is not None:
            output = output + self._waiting
            self._waiting = None
        if later is not None:
            later = without(later, resident)
            self.cpu_runs.append(CpuRun(layer, later))
            self._waiting = self._sum(layer, rows, later, weights)
        return output

    def _adds_deferred(self, layer: int) -> bool:
        return layer in MOE_LAYERS and len(self.on_device[layer]) < EXPERTS

    def _sum(
        self, layer: int, rows: torch.Tensor, ids: Sequence[Sequence[int]], weights: torch.Tensor
    ) -> torch.Tensor:
        gate, up, down = _exact_weights(layer, self._method)
        factors = torch.zeros(len(rows), EXPERTS + 1, dtype=rows.dtype)
        factors.scatter_add_(1, torch.tensor(ids) % (EXPERTS + 1), weights)
        middle = torch.nn.functional.silu(rows @ gate.mT) * (rows @ up.mT)  # [E, T, I]
        return ((middle @ down.mT) * factors.t()[:EXPERTS, :, None]).sum(0)


def wait_for_copy(updater: BackgroundUpdater) -> None:
    """Until what the updater copies at the moment, if anything, is there or has failed."""
    if updater._copy is not None:
        updater._copy.result.exception(timeout=30)


@cache
def _exact_weights(layer: int, method: str) -> tuple[torch.Tensor, ...]:
    """float64 gate, up, down of what a checkpoint for `method` holds."""
    matrices = [list(tensor.unbind()) for tensor in expert_weights(layer)]
    return decoded(method, quantize_experts(method, *matrices))
