"""How long a prompt takes when whole layers are streamed to the device, and which chunk size makes that pay.

Every chunk of a prompt streams all experts once. A layer takes the longer of its copying and its computing,
and only the first layer's copying is not hidden behind anything:

    seconds of a chunk = copy + sum over layers of max(copy, compute(tokens) + launches)

So small chunks are bound by the bus, whatever their length, and a chunk long enough to be bound by computing
gains nothing more by being longer, but needs more memory. All of this is an estimate; nothing is measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

GIB = 1 << 30

# Layers on the device at once: one computes, the next arrives.
STREAMED_LAYERS = 2
# Chunk sizes that are looked at: powers of two.
SMALLEST_CHUNK = 2048
LARGEST_CHUNK = 65536
# A longer chunk must be worth its memory: the shortest one within this share of the best speed is chosen.
_GOOD_ENOUGH = 0.95
# The prompt by which chunk sizes are compared, where the model's context is as long.
REFERENCE_PROMPT = 32768
# Between what the largest layer needs and what allocators, workspaces and fragmentation make of it.
_ACTIVATION_MARGIN = 2.0
# Tensors of hidden size and of the attention's heads that live at once while a layer runs.
_HIDDEN_COPIES = 6
_HEAD_COPIES = 4
_ACTIVATION_BYTES = 2  # bf16
# Methods whose experts have native slots with the kernels that SGLang chooses itself, on most devices. These
# may be a little larger than what is stored; slots of other methods are planned with two bytes a weight.
_NATIVE_SLOTS = ("BF16", "FP8", "FP8_PERCHANNEL", "RAWINT4", "GPTQ_INT4", "NVFP4")
_NATIVE_MARGIN = 1.1


def slot_bytes(method: str, expert_bytes: float, plain: float) -> float:
    """Of one expert on the device: `expert_bytes` as stored, `plain` in two bytes a weight."""
    return _NATIVE_MARGIN * expert_bytes if method in _NATIVE_SLOTS else plain


@dataclass(frozen=True)
class PrefillModel:
    """The sizes that matter. `expert_bytes`: of one expert as it crosses the bus; `slot_bytes`: of one on the
    device. `heads`, `head_dim`: of the attention, for its part that grows with the square of the prompt.
    `kv_bytes`: of the KV cache for one token; `other_bytes`: of all weights but the routed experts. All are
    those of one rank.
    """

    layers: int
    moe_layers: int
    experts: int
    top_k: int
    hidden: int
    intermediate: int
    heads: int
    head_dim: int
    expert_bytes: float
    slot_bytes: float
    kv_bytes: float
    other_bytes: float

    @property
    def layer_bytes(self) -> float:
        """What one streamed layer moves over the bus."""
        return self.experts * self.expert_bytes

    @property
    def activation_bytes_per_token(self) -> float:
        """Of a chunk, while its largest layer runs."""
        values = (
            _HIDDEN_COPIES * self.hidden
            + _HEAD_COPIES * self.heads * self.head_dim
            + self.top_k * (3 * self.intermediate + self.hidden)
        )
        return _ACTIVATION_MARGIN * _ACTIVATION_BYTES * values

    def compute_seconds(self, tokens: int, before: int, flops: float) -> float:
        """One layer's, for `tokens` that follow `before` others of the same prompt."""
        experts = 6 * self.top_k * self.hidden * self.intermediate
        projections = (
            4 * self.hidden * self.heads * self.head_dim
        )  # queries and output; keys and values are few
        pairs = tokens * before + tokens * (tokens + 1) / 2
        attention = 4 * pairs * self.heads * self.head_dim
        return (tokens * (experts + projections) + attention) / flops


@dataclass(frozen=True)
class PrefillMachine:
    """`bus`: bytes per second to the device; `flops`: of the device's kernels as they run, not their peak;
    `seconds_per_copy`: added to each expert's bytes; `seconds_per_layer`: launches of one layer.
    """

    bus: float = 25e9
    flops: float = 100e12
    seconds_per_copy: float = 12e-6
    seconds_per_layer: float = 100e-6

    def __str__(self) -> str:
        return (
            f"{self.bus / 1e9:.0f} GB/s to the device, {self.flops / 1e12:.0f} TFLOP/s, "
            f"{self.seconds_per_copy * 1e6:.0f} us per copied expert"
        )


@dataclass(frozen=True)
class PrefillMemory:
    """Bytes of a rank's device. `slots`: for the layers that are streamed; `residents`: experts that stay;
    `activations`: the most that they may take.
    """

    total: float
    slots: float = 0.0
    residents: float = 0.0
    activations: float = math.inf

    def largest_chunk(self, model: PrefillModel, prompt: int) -> int:
        """The most tokens whose activations fit beside weights, slots and the KV cache of `prompt` tokens."""
        taken = model.other_bytes + self.slots + self.residents + prompt * model.kv_bytes
        free = min(self.total - taken, self.activations)
        return max(0, int(free / model.activation_bytes_per_token))


@dataclass(frozen=True)
class ChunkChoice:
    """`tokens_per_second`: the estimate for a prompt of `prompt` tokens; `stock`: the same with the chunk
    size that the server would have used.
    """

    chunk: int
    prompt: int
    tokens_per_second: float
    stock: float


def chunk_seconds(model: PrefillModel, machine: PrefillMachine, tokens: int, before: int = 0) -> float:
    """One chunk of `tokens` behind `before` others, all experts streamed."""
    copy = model.layer_bytes / machine.bus + model.experts * machine.seconds_per_copy
    compute = model.compute_seconds(tokens, before, machine.flops) + machine.seconds_per_layer
    return copy + model.moe_layers * max(copy, compute) + (model.layers - model.moe_layers) * compute


def tokens_per_second(model: PrefillModel, machine: PrefillMachine, prompt: int, chunk: int) -> float:
    """Of a prompt that is cut into chunks."""
    starts = range(0, prompt, chunk)
    seconds = sum(chunk_seconds(model, machine, min(chunk, prompt - at), at) for at in starts)
    return prompt / seconds


def candidates(least: int, most: int) -> list[int]:
    """Powers of two from `least` up to `most`, and `least` itself if that is none; ascending."""
    powers = (1 << exponent for exponent in range(int(math.log2(LARGEST_CHUNK)) + 1))
    fitting = {chunk for chunk in powers if max(least, SMALLEST_CHUNK) <= chunk <= most}
    return sorted(fitting | {least} if least <= most else fitting)


def choose_chunk(
    model: PrefillModel,
    machine: PrefillMachine,
    memory: PrefillMemory,
    *,
    threshold: int,
    stock: int,
    context: int,
) -> ChunkChoice:
    """The chunk size for a server that streams chunks of at least `threshold` tokens.

    `stock` is what the server would use otherwise: it is taken where nothing larger fits into memory, even if
    it is below the threshold, and is never made smaller. `context`: the longest prompt.
    """
    prompt = max(1, min(context, REFERENCE_PROMPT))
    fits = memory.largest_chunk(model, prompt)
    least = stock if threshold > fits else max(threshold, stock)
    most = max(least, min(fits, context))
    speeds = {c: tokens_per_second(model, machine, prompt, c) for c in candidates(least, most)}
    enough = _GOOD_ENOUGH * max(speeds.values())
    chunk = next(chunk for chunk, speed in speeds.items() if speed >= enough)
    return ChunkChoice(chunk, prompt, speeds[chunk], tokens_per_second(model, machine, prompt, stock))


def speed_table(
    model: PrefillModel, machine: PrefillMachine, prompts: Iterable[int], chunks: Iterable[int]
) -> str:
    """Tokens per second in Markdown: a row per prompt length, a column per chunk size."""
    chunks = tuple(chunks)
    lines = [
        "| prompt | " + " | ".join(f"chunks of {chunk}" for chunk in chunks) + " |",
        "|---:" * (len(chunks) + 1) + "|",
    ]
    for prompt in prompts:
        speeds = (f"{tokens_per_second(model, machine, prompt, chunk):.0f}" for chunk in chunks)
        lines.append(f"| {prompt} | " + " | ".join(speeds) + " |")
    return "\n".join(lines)
