"""Expected tokens/s: bytes that must be read and products that must be made, over what the machine does.

    decode    one token, short context:  read experts / (bandwidth x share) + read other weights / (...)
                                         + layers x LAYER_SECONDS + STEP_SECONDS
    prefill   a prompt of 1024 tokens:   the longer of its products / (peak x share) and reading all weights,
                                         + the step

With a GPU the other weights are read there, experts on both sides at once, and long prompts stream all
experts over the bus where that is quicker (kt_kernel/hybrid/prefill_plan.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from kt_kernel.hybrid.prefill_plan import tokens_per_second
from kt_kernel.planning import dense_storage
from kt_kernel.planning.gpu_plan import GpuPlan
from kt_kernel.planning.machine_facts import UNKNOWN_GPU, MachineFacts
from kt_kernel.planning.measured_shares import (
    FLOAT32_READ,
    GPU_LAYER_SECONDS,
    GPU_MULTIPLY,
    GPU_READ,
    LAYER_SECONDS,
    STEP_SECONDS,
    SUM_SECONDS,
    shares_of,
)
from kt_kernel.planning.model_facts import ModelFacts
from kt_kernel.planning.spread import Spread
from kt_kernel.planning.user_options import UserOptions

PROMPT = 1024
"""Tokens of the prompt for which prefill is estimated."""
# float32 products are FMAs, whose peak is half of the bf16 peak on Zen 4: 60 % of that. Not measured.
_FLOAT32_MULTIPLY = 0.3


@dataclass(frozen=True)
class Speed:
    """`bound`: what takes most of the time, in words."""

    tokens_per_second: float
    bound: str


@dataclass(frozen=True)
class _Part:
    seconds: float
    bound: str


def _speed(tokens: int, parts: list[_Part]) -> Speed:
    seconds = sum(part.seconds for part in parts)
    return Speed(tokens / seconds, max(parts, key=lambda part: part.seconds).bound)


def expected_speeds(
    facts: ModelFacts,
    machine: MachineFacts,
    options: UserOptions,
    dtype: str | None,
    gpu: GpuPlan | None,
) -> tuple[Speed, Speed]:
    """Of prefill and of decoding one stream."""
    limits = _with_threads(machine, options)
    if gpu is None:
        dense = dense_storage.on_cpu(facts, options, dtype)
        spread = Spread.of(options)
        decode = _cpu_decode(facts, machine, dense, limits, spread)
        return _cpu_prefill(facts, machine, dense, limits, spread), decode
    return _gpu_prefill(facts, machine, gpu, limits), _gpu_decode(facts, machine, gpu, limits)


@dataclass(frozen=True)
class _CpuLimits:
    read: float
    multiply: float


def _with_threads(machine: MachineFacts, options: UserOptions) -> _CpuLimits:
    """Fewer threads than were measured multiply that much less; memory is full with half of them."""
    asked = options.integer("--kt-cpuinfer") or machine.threads
    share = min(1.0, asked / machine.threads)
    return _CpuLimits(machine.limits.read * min(1.0, 2 * share), machine.limits.bf16 * share)


# ---- without a GPU -------------------------------------------------------------------------------


def _cpu_decode(
    facts: ModelFacts,
    machine: MachineFacts,
    dense: dense_storage.DenseStorage,
    limits: _CpuLimits,
    spread: Spread,
) -> Speed:
    """Hosts that share a layer are taken to be as fast as this one."""
    read_at_once = spread.hosts_of_a_layer
    experts = facts.expert_bytes * facts.sizes.top_k / facts.sizes.experts / read_at_once
    others = dense.read / read_at_once
    expert_rate = limits.read * shares_of(facts.method, machine.variant).read
    dense_rate = limits.read * _dense_read(dense.format, machine.variant)
    return _speed(
        1,
        [
            _Part(
                experts / expert_rate,
                f"reading {_size(experts)} of experts for each token at {_rate(expert_rate)}",
            ),
            _Part(
                others / dense_rate,
                f"reading {_size(others)} of other weights for each token at {_rate(dense_rate)}",
            ),
            _Part(STEP_SECONDS + facts.sizes.layers * LAYER_SECONDS, "small operators and the scheduler"),
            _Part(_exchange_seconds(facts, spread), "sums over the ranks"),
        ],
    )


def _exchange_seconds(facts: ModelFacts, spread: Spread) -> float:
    """Of a step: two sums over the ranks in each layer, and a hidden state from stage to stage and back."""
    sums = 2 * facts.sizes.layers if spread.ranks > 1 else 0
    return (sums + (spread.stages if spread.stages > 1 else 0)) * SUM_SECONDS


def _cpu_prefill(
    facts: ModelFacts,
    machine: MachineFacts,
    dense: dense_storage.DenseStorage,
    limits: _CpuLimits,
    spread: Spread,
) -> Speed:
    at_once = spread.hosts_of_a_layer
    whole = _cpu_experts(facts, machine, limits, PROMPT)
    experts = _Part(whole.seconds / at_once, whole.bound)
    share = (
        _FLOAT32_MULTIPLY if dense.format == "float32" else shares_of(dense.format, machine.variant).multiply
    )
    operations = 2 * PROMPT * facts.read_dense_parameters
    other = _Part(
        operations / at_once / (limits.multiply * share),
        f"multiplying other weights at {_operations(limits.multiply * share)}",
    )
    return _speed(PROMPT, [experts, other, _Part(STEP_SECONDS, "the scheduler")])


def _cpu_experts(facts: ModelFacts, machine: MachineFacts, limits: _CpuLimits, tokens: int) -> _Part:
    """Of `tokens` in one call: products, or the reading of all that are used, whichever takes longer."""
    shares = shares_of(facts.method, machine.variant)
    rate = limits.multiply * shares.multiply
    multiplying = 2 * tokens * facts.active_expert_parameters / rate
    used = min(1.0, tokens * facts.sizes.top_k / facts.sizes.experts) * facts.expert_bytes
    reading = used / (limits.read * shares.read)
    if multiplying >= reading:
        return _Part(multiplying, f"multiplying experts at {_operations(rate)}")
    return _Part(reading, f"reading {_size(used)} of experts at {_rate(limits.read * shares.read)}")


def _dense_read(kind: str, variant: str) -> float:
    return FLOAT32_READ if kind == "float32" else shares_of(kind, variant).read


# ---- with GPUs -----------------------------------------------------------------------------------


def _gpu_decode(facts: ModelFacts, machine: MachineFacts, gpu: GpuPlan, limits: _CpuLimits) -> Speed:
    speed = machine.gpus[0].known or UNKNOWN_GPU
    on_gpu = gpu.experts / facts.sizes.experts
    experts = facts.expert_bytes * facts.sizes.top_k / facts.sizes.experts
    expert_rate = limits.read * shares_of(facts.method, machine.variant).read
    cpu = (1 - on_gpu) * experts / expert_rate
    slots = on_gpu * facts.sizes.top_k * gpu.prefill.moe_layers * gpu.prefill.slot_bytes
    resident = slots / (GPU_READ * speed.memory)
    dense = dense_storage.on_gpu(facts).read / gpu.ranks
    parts = [
        _Part(
            max(cpu, resident),
            f"reading {_size((1 - on_gpu) * experts)} of experts for each token at {_rate(expert_rate)}"
            if cpu >= resident
            else f"reading {_size(slots)} of experts for each token on the GPU",
        ),
        _Part(
            dense / (GPU_READ * speed.memory),
            f"reading {_size(dense)} of other weights for each token on the GPU",
        ),
        _Part(STEP_SECONDS + facts.sizes.layers * GPU_LAYER_SECONDS, "launches and exchanges"),
    ]
    return _speed(1, parts)


def _gpu_prefill(facts: ModelFacts, machine: MachineFacts, gpu: GpuPlan, limits: _CpuLimits) -> Speed:
    if gpu.threshold and gpu.threshold <= PROMPT:
        streamed = tokens_per_second(gpu.prefill, gpu.machine, PROMPT, gpu.chunk)
        copy = gpu.prefill.layer_bytes / gpu.machine.bus
        computing = gpu.prefill.compute_seconds(PROMPT, 0, gpu.machine.flops)
        what = "copying all experts to the GPU" if copy >= computing else "computing on the GPU"
        return Speed(streamed, f"{what} ({_rate(gpu.machine.bus)} of PCIe)")
    speed = machine.gpus[0].known or UNKNOWN_GPU
    experts = _cpu_experts(facts, machine, limits, PROMPT)
    left = 1 - gpu.experts / facts.sizes.experts
    operations = 2 * PROMPT * facts.read_dense_parameters / gpu.ranks
    parts = [
        _Part(experts.seconds * left, experts.bound),
        _Part(operations / (GPU_MULTIPLY * speed.flops), "multiplying other weights on the GPU"),
        _Part(STEP_SECONDS + facts.sizes.layers * GPU_LAYER_SECONDS, "launches and exchanges"),
    ]
    return _speed(PROMPT, parts)


def _size(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


def _rate(per_second: float) -> str:
    return f"{per_second / 1e9:.0f} GB/s"


def _operations(per_second: float) -> str:
    return f"{per_second / 1e12:.2f} TFLOP/s"
