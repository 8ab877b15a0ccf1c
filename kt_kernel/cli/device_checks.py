"""The checks behind `kt doctor --device`: every path between CPU and device, run once on a small layer.

The device may be a CPU: then all is checked but what only a GPU has. A check never raises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from kt_kernel import KTMoEWrapper, kt_kernel_ext
from kt_kernel.cli.checks.finding import Finding, Status
from kt_kernel.hybrid.layer import HybridLayer
from kt_kernel.hybrid.model import HybridModel
from kt_kernel.hybrid.options import HybridOptions
from kt_kernel.hybrid.slots import LayerPlacement, Placement
from kt_kernel.hybrid.torch_experts import TorchDeviceExperts

EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 8, 2, 256, 128
_RESIDENT = 3
_TOKENS = 16
_TOLERANCE_NMSE = 1e-4  # bfloat16 in and out, sums in another order: 1e-5
_REPLAYS = 100


@dataclass(frozen=True)
class Path:
    """One way that data goes between CPU and device."""

    name: str
    check: Callable[[torch.device], Finding]


class _Model:
    """One hybrid layer with BF16 experts, and the same layer on the CPU alone."""

    def __init__(self, device: torch.device, threads: int, options: HybridOptions) -> None:
        generator = torch.Generator().manual_seed(0)

        def matrix(rows: int, columns: int) -> torch.Tensor:
            values = torch.randn(EXPERTS, rows, columns, generator=generator) / columns**0.5
            return values.bfloat16()

        weights = matrix(INTERMEDIATE, HIDDEN), matrix(INTERMEDIATE, HIDDEN), matrix(HIDDEN, INTERMEDIATE)
        self._reference = _wrapper(weights, threads)
        self.device = device
        self.model = HybridModel(options, device=device)
        wrapper = _wrapper(weights, threads)
        mask = torch.arange(EXPERTS) < _RESIDENT
        self.layer = HybridLayer(
            0,
            wrapper,
            self._room(wrapper, _RESIDENT),
            LayerPlacement(Placement.initial(mask)),
            lambda count: self._room(wrapper, count),
            self.model,
        )
        self.layer.load_residents()
        self.model.prepare()

    def _room(self, wrapper: KTMoEWrapper, count: int) -> TorchDeviceExperts:
        encoding = wrapper.encoding(1)
        return TorchDeviceExperts(count, HIDDEN, INTERMEDIATE, torch.bfloat16, self.device, encoding)

    def tokens(self, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        hidden = torch.randn(_TOKENS, HIDDEN, generator=generator).bfloat16()
        # Later experts more often, which have no slot at first; none never.
        likes = 3 * EXPERTS * torch.rand(_TOKENS, EXPERTS, generator=generator) + torch.arange(EXPERTS)
        weights, ids = torch.topk(likes, TOP_K)
        return hidden, ids, weights / (4 * EXPERTS)

    def step(self, seed: int) -> float:
        """One pass on the device; its NMSE against the CPU alone."""
        self.model.begin_step()
        tokens = self.tokens(seed)
        found = self.layer.forward(*(tensor.to(self.device) for tensor in tokens))
        return self.error(found, tokens)

    def error(self, found: torch.Tensor, tokens: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> float:
        hidden, ids, weights = tokens
        expected = self._reference.forward(hidden.float(), ids, weights, None).double()
        return float((found.cpu().double() - expected).square().sum() / expected.square().sum())


def _wrapper(weights: tuple[torch.Tensor, torch.Tensor, torch.Tensor], threads: int) -> KTMoEWrapper:
    wrapper = KTMoEWrapper(
        layer_idx=0,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        hidden_size=HIDDEN,
        moe_intermediate_size=INTERMEDIATE,
        gpu_experts_mask=None,
        cpuinfer_threads=threads,
        threadpool_count=1,
        weight_path="",
        chunked_prefill_size=_TOKENS,
        method="BF16",
    )
    wrapper.load_weights_from_tensors(*weights, torch.arange(EXPERTS))
    return wrapper


def _judged(error: float, what: str) -> Finding:
    if error <= _TOLERANCE_NMSE:
        return Finding(Status.OK, f"{what}; error {error:.0e}")
    return Finding(Status.FAIL, f"{what}; error {error:.0e}, expected at most {_TOLERANCE_NMSE:.0e}")


def paths(threads: int) -> Iterator[Path]:
    """All paths of the engine, in the order in which they build upon each other."""

    def split(device: torch.device) -> Finding:
        model = _Model(device, threads, HybridOptions())
        return _judged(max(model.step(seed) for seed in range(3)), "CPU and device share a layer")

    def prefill(device: torch.device) -> Finding:
        model = _Model(device, threads, HybridOptions(prefill_threshold=2))
        error = max(model.step(seed) for seed in range(3))
        if not model.model.prefill.chunks or model.model.prefill.fallbacks:
            return Finding(Status.FAIL, "the layer did not run on the device alone")
        return _judged(error, "whole layers on the device")

    def update(device: torch.device) -> Finding:
        model = _Model(device, threads, HybridOptions(prefill_threshold=2, update_after_prefill=True))
        error = max(model.step(seed) for seed in range(3))
        moved = sorted(set(model.layer.placement.current.experts) - set(range(_RESIDENT)))
        if not moved:
            return Finding(Status.FAIL, "no expert was moved, though others are used more")
        return _judged(error, f"{len(moved)} experts moved to the device")

    def misses(device: torch.device) -> Finding:
        model = _Model(device, threads, HybridOptions(miss_policy="auto"))
        error = max(model.step(seed) for seed in range(3))
        # How many pays is measured: on a slow bus none may.
        return _judged(error, f"{model.model.misses.experts_fetched} experts fetched for one step each")

    def signals(device: torch.device) -> Finding:
        if device.type != "cuda":
            return Finding(Status.WARN, "needs a CUDA device")
        found = kt_kernel_ext.device_signals()
        return Finding(Status.OK, f"{found['kind']}: {found['reason']}")

    def graph(device: torch.device) -> Finding:
        if device.type != "cuda":
            return Finding(Status.WARN, "needs a CUDA device")
        return _replayed(_Model(device, threads, HybridOptions()))

    yield Path("split", split)
    yield Path("prefill", prefill)
    yield Path("update", update)
    yield Path("misses", misses)
    yield Path("signals", signals)
    yield Path("graph replay", graph)


def _replayed(model: _Model) -> Finding:
    """One layer captured once and replayed with other tokens."""
    inputs = [tensor.to(model.device) for tensor in model.tokens(0)]
    model.layer.forward(*inputs)  # outside first: buffers and kernels
    torch.cuda.synchronize(model.device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = model.layer.forward(*inputs)
    worst = 0.0
    for seed in range(_REPLAYS):
        tokens = model.tokens(seed)
        for place, tensor in zip(inputs, tokens, strict=True):
            place.copy_(tensor)
        model.model.begin_step()
        graph.replay()
        torch.cuda.synchronize(model.device)
        worst = max(worst, model.error(output, tokens))
    return _judged(worst, f"{_REPLAYS} replays of one graph")
