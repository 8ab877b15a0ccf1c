"""What the GPUs hold: dense weights, KV cache, workspace, and with what is left experts.

The order of what gets memory: weights that must be there, activations of a chunk, a KV cache, two streamed
layers where streaming pays, experts. No GPU was at hand: the sums follow SGLang's and our own memory plans
(kt_kernel/hybrid/memory_plan.py) and have only been checked by arithmetic.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from kt_kernel.hybrid.prefill_plan import (
    STREAMED_LAYERS,
    PrefillMachine,
    PrefillMemory,
    PrefillModel,
    choose_chunk,
    slot_bytes,
)
from kt_kernel.planning.dense_storage import on_gpu
from kt_kernel.planning.errors import DoesNotFitError, gigabytes
from kt_kernel.planning.expert_backend import takes_experts
from kt_kernel.planning.machine_facts import UNKNOWN_GPU, Gpu, MachineFacts
from kt_kernel.planning.measured_shares import GPU_MULTIPLY, shares_of
from kt_kernel.planning.model_facts import ModelFacts
from kt_kernel.planning.requests import States, kept_states, kv_bytes
from kt_kernel.planning.user_options import UserOptions

# What the CUDA context, the libraries' workspaces and the captured graphs take of each GPU.
_CONTEXT_BYTES = 1.5e9
_CONTEXT_SHARE = 0.03
_WIDTH = 2  # bytes of a number in the model's dtype on a GPU
# SGLang's own chunk size below 60 GB of memory, and above.
_STOCK_CHUNK, _LARGE_CHUNK, _LARGE_GPU = 4096, 8192, 60e9
# Tokens of KV cache wanted where the model's context allows, at most half of what is left; and the fewest
# with which a server is of use.
_WANTED_TOKENS, _LEAST_TOKENS = 65536, 2048
_TOKENS_STEP = 1024
# Activations of a longer chunk may take this share of the memory.
_MOST_ACTIVATIONS = 0.2
# Prompts shorter than this are not worth streaming all experts for, and longer thresholds would never apply.
_LEAST_THRESHOLD, _MOST_THRESHOLD = 512, 8192
_THRESHOLD_STEP = 256


@dataclass(frozen=True)
class GpuPlan:
    """Bytes are those of each of `ranks` GPUs. `experts`: of every layer; `threshold`: 0 = never;
    `static_share`: of the memory that SGLang finds free, for all but the activations.
    """

    ranks: int
    dense: float
    workspace: float
    states: States
    kv_tokens: int
    kv_bytes: float
    streamed: float
    experts: int
    expert_bytes: float
    threshold: int
    chunk: int
    static_share: float
    prefill: PrefillModel
    machine: PrefillMachine

    @property
    def total(self) -> float:
        return (
            self.dense
            + self.workspace
            + self.states.bytes
            + self.kv_bytes
            + self.streamed
            + self.expert_bytes
        )


def rank_count(facts: ModelFacts, machine: MachineFacts, options: UserOptions) -> int:
    """As asked for, else the largest power of two of GPUs that divides the heads; 1 where the user shares the
    GPUs out in another way.
    """
    if (asked := options.integer("--tp-size")) is not None:
        return max(1, min(asked, len(machine.gpus)))
    ranks = 1
    if options.has("--pp-size") or options.has("--dp-size"):
        return ranks
    while ranks * 2 <= len(machine.gpus) and facts.sizes.heads % (ranks * 2) == 0:
        ranks *= 2
    return ranks


def plan_gpus(facts: ModelFacts, machine: MachineFacts, options: UserOptions) -> GpuPlan:
    """Raises DoesNotFitError if the weights that must be there do not fit, or what was asked for."""
    ranks = rank_count(facts, machine, options)
    gpu = min(machine.gpus[:ranks], key=lambda g: g.free_bytes)
    model = prefill_model(facts, ranks)
    streaming = PrefillMachine(
        bus=gpu.bus_bytes_per_second, flops=GPU_MULTIPLY * (gpu.known or UNKNOWN_GPU).flops
    )
    stock = _LARGE_CHUNK if gpu.memory_bytes > _LARGE_GPU else _STOCK_CHUNK
    reserve = max(_CONTEXT_BYTES, _CONTEXT_SHARE * gpu.memory_bytes)
    states = kept_states(facts, options, ranks, _WIDTH, gpu.free_bytes)
    weights = model.other_bytes + states.bytes
    left = gpu.free_bytes - reserve - weights - stock * model.activation_bytes_per_token
    threshold, streamed = _streaming(facts, machine, options, model, streaming, left)
    chunk = options.integer("--chunked-prefill-size")
    if chunk is None:
        chunk = stock
        if threshold:
            memory = PrefillMemory(
                gpu.free_bytes - reserve - states.bytes,
                slots=streamed,
                activations=_MOST_ACTIVATIONS * gpu.free_bytes,
            )
            context = facts.sizes.context
            chunk = choose_chunk(
                model, streaming, memory, threshold=threshold, stock=stock, context=context
            ).chunk
    workspace = reserve + chunk * model.activation_bytes_per_token
    left = gpu.free_bytes - workspace - weights - streamed
    tokens = _kv_tokens(facts, options, left / model.kv_bytes)
    left -= tokens * model.kv_bytes
    if left < 0:
        raise DoesNotFitError(
            f"GPU {gpu.index}", gpu.free_bytes - left, gpu.free_bytes, _ways(options, model, tokens, left)
        )
    experts = _experts(facts, options, left, model, gpu)
    activations = chunk * model.activation_bytes_per_token
    return GpuPlan(
        ranks=ranks,
        dense=model.other_bytes,
        workspace=workspace,
        states=states,
        kv_tokens=tokens,
        kv_bytes=tokens * model.kv_bytes,
        streamed=streamed,
        experts=experts,
        expert_bytes=experts * model.moe_layers * model.slot_bytes,
        threshold=threshold,
        chunk=chunk,
        # SGLang's own share follows from the chunk alone, at 1.5 MiB a token: more than a small GPU has for
        # the chunks of streaming.
        static_share=math.ceil(1000 * (1 - activations / (gpu.free_bytes - reserve))) / 1000,
        prefill=model,
        machine=streaming,
    )


def prefill_model(facts: ModelFacts, ranks: int) -> PrefillModel:
    """The sizes of one rank."""
    sizes = facts.sizes
    plain = 2 * sizes.expert_parameters
    stored = facts.bytes_per_expert
    return PrefillModel(
        layers=sizes.layers,
        moe_layers=sizes.moe_layers,
        experts=sizes.experts,
        top_k=sizes.top_k,
        hidden=sizes.hidden,
        intermediate=math.ceil(sizes.intermediate / ranks),
        heads=math.ceil(sizes.heads / ranks),
        head_dim=sizes.head_dim,
        expert_bytes=stored / ranks,
        slot_bytes=slot_bytes(facts.method, stored, plain) / ranks,
        kv_bytes=kv_bytes(sizes, ranks, _WIDTH),
        other_bytes=on_gpu(facts).total / ranks,
    )


def _streaming(
    facts: ModelFacts,
    machine: MachineFacts,
    options: UserOptions,
    model: PrefillModel,
    streaming: PrefillMachine,
    left: float,
) -> tuple[int, float]:
    """From how many tokens on whole layers are streamed, and the bytes of their slots; 0 and 0 for never."""
    slots = STREAMED_LAYERS * model.experts * model.slot_bytes
    if (asked := options.integer("--kt-gpu-prefill-token-threshold")) is not None:
        return (asked, slots) if asked > 0 else (0, 0.0)
    if facts.has_biases or _all_experts_stay(facts, options, left, model):
        return 0, 0.0
    copy = model.layer_bytes / streaming.bus + model.experts * streaming.seconds_per_copy
    multiply = shares_of(facts.method, machine.variant).multiply * machine.limits.bf16
    cpu_seconds_per_token = 2 * facts.sizes.top_k * facts.sizes.expert_parameters / multiply
    pays_from = copy / cpu_seconds_per_token
    threshold = max(_LEAST_THRESHOLD, math.ceil(pays_from / _THRESHOLD_STEP) * _THRESHOLD_STEP)
    # Half of what is left stays for the KV cache and experts.
    return (threshold, slots) if threshold <= _MOST_THRESHOLD and slots <= left / 2 else (0, 0.0)


def _all_experts_stay(facts: ModelFacts, options: UserOptions, left: float, model: PrefillModel) -> bool:
    """On the GPU, beside the KV cache: there is nothing to stream."""
    wanted = _experts_asked(facts, options)
    if wanted is not None and wanted < facts.sizes.experts:
        return False
    cache = model.kv_bytes * _kv_tokens(facts, options, left / model.kv_bytes)
    return cache + model.moe_layers * facts.sizes.experts * model.slot_bytes <= left


def _kv_tokens(facts: ModelFacts, options: UserOptions, most: float) -> int:
    if (asked := options.integer("--max-total-tokens")) is not None:
        return asked
    context = options.integer("--context-length") or facts.sizes.context
    wanted = min(context, _WANTED_TOKENS, int(most / 2))
    return max(_LEAST_TOKENS, wanted // _TOKENS_STEP * _TOKENS_STEP)


def _experts(facts: ModelFacts, options: UserOptions, left: float, model: PrefillModel, gpu: Gpu) -> int:
    """Of every layer; what was asked for if it fits, else as many as do."""
    layer_of_one = model.moe_layers * model.slot_bytes
    most = min(facts.sizes.experts, max(0, int(left // layer_of_one)))
    asked = _experts_asked(facts, options)
    if asked is None:
        return most if takes_experts(facts, gpu) else 0
    if asked > most and asked <= facts.sizes.experts:
        raise DoesNotFitError(
            f"GPU {gpu.index}, for {asked} experts of each layer,",
            asked * layer_of_one,
            left,
            [
                f"--kt-num-gpu-experts {most} ({gigabytes(most * layer_of_one)})",
                "a smaller --max-total-tokens",
            ],
        )
    return asked


def _experts_asked(facts: ModelFacts, options: UserOptions) -> int | None:
    """Of every layer, by number or by share."""
    if (share := options.share("--kt-gpu-experts-ratio")) is not None:
        return math.ceil(share * facts.sizes.experts)
    return options.integer("--kt-num-gpu-experts")


def _ways(options: UserOptions, model: PrefillModel, tokens: int, left: float) -> list[str]:
    """What would make up for `left` bytes, which are negative."""
    ways = []
    fewer = tokens + math.floor(left / model.kv_bytes)
    if options.has("--max-total-tokens") and fewer >= _LEAST_TOKENS:
        ways.append(f"--max-total-tokens {fewer // _TOKENS_STEP * _TOKENS_STEP or fewer} (a shorter context)")
    if options.has("--chunked-prefill-size"):
        ways.append("a smaller --chunked-prefill-size")
    ways.append(f"GPUs with {gigabytes(-left)} more each, or more of them (--tp-size)")
    ways.append("a checkpoint whose layers outside the experts are smaller (FP8)")
    return ways
