"""Expected tokens/s must stay near what was measured. The measurements are recorded; nothing is timed."""

from __future__ import annotations

from dataclasses import replace

import pytest
from machines import DESKTOP, EPYC, NO_GPU, XEON

from kt_kernel.machine_limits import Limits
from kt_kernel.planning.config_facts import sizes_of_config
from kt_kernel.planning.machine_facts import MachineFacts, Node
from kt_kernel.planning.model_facts import GGUF, SAFETENSORS, ModelFacts
from kt_kernel.planning.plan import Preferences, make_plan
from kt_kernel.planning.registry import Registry, shipped_entries
from kt_kernel.planning.user_options import UserOptions

REGISTRY = Registry(shipped_entries())  # whatever the user of this machine has added
VOCABULARY, LAYERS, HIDDEN = 4096, 4, 2048


def zen4(read: float) -> MachineFacts:
    """Two cores in a virtual machine; `read` GB/s in that run (2026-11-30), peaks: doc/measurements.md."""
    memory = 25 * 10**9
    limits = Limits(read * 1e9, 455e9, 890e9)
    return MachineFacts("AMD EPYC", "avx512_bf16", 2, (Node(0, 2, memory, memory),), memory, memory, limits)


def four_layers(method: str, container: str, bits: float, kind: str) -> ModelFacts:
    """Four layers of Qwen3-30B-A3B, as bench/end_to_end.py makes them."""
    config = {**REGISTRY.find("qwen3-30b").config, "num_hidden_layers": LAYERS, "vocab_size": VOCABULARY}
    sizes = sizes_of_config(config)
    experts = LAYERS * sizes.experts * sizes.expert_parameters
    embedding = VOCABULARY * HIDDEN
    attention = LAYERS * (2 * HIDDEN * 4096 + 2 * HIDDEN * 512 + 128 * HIDDEN)
    return ModelFacts(
        sizes=sizes,
        method=method,
        container=container,
        expert_bytes=int(experts * bits / 8),
        dense_bytes=int((attention + 2 * embedding) * bits / 8),
        embedding_bytes=int(embedding * bits / 8),
        dense_parameters=attention + 2 * embedding,
        embedding_parameters=embedding,
        dense_format=kind,
    )


# facts, dtype, read bandwidth of the run in GB/s, decode and prefill (of 1024) measured: doc/operators.md
MEASURED = {
    "BF16": (four_layers("BF16", SAFETENSORS, 16, "BF16"), None, 36.5, 53.8, 537),
    "Q8_0": (four_layers("LLAMAFILE", GGUF, 8.5, "Q8_0"), None, 33.4, 83.6, 789),
    "Q4_K_M": (four_layers("LLAMAFILE", GGUF, 4.9, "Q4_K"), None, 53.4, 171.9, 817),
    "demo": (REGISTRY.find("demo").facts(), "float32", 38.8, 54.2, 781),
    "demo in bfloat16": (REGISTRY.find("demo").facts(), None, 38, 80, None),
}


@pytest.mark.parametrize("name", MEASURED)
def test_expected_speeds_are_near_those_measured(name):
    facts, dtype, read, decode, prefill = MEASURED[name]
    made = make_plan(name, facts, zen4(read), UserOptions(), Preferences(dtype=dtype))
    assert made.decode.tokens_per_second == pytest.approx(decode, rel=0.4)
    if prefill:
        assert made.prefill.tokens_per_second == pytest.approx(prefill, rel=0.4)


def test_bound_is_what_takes_the_most_time():
    deepseek = REGISTRY.find("deepseek-v3").facts()
    assert "of experts for each token" in make_plan("m", deepseek, XEON, UserOptions()).decode.bound
    demo = REGISTRY.find("demo").facts()
    fast = replace(NO_GPU, limits=replace(NO_GPU.limits, read=1e13))
    assert "scheduler" in make_plan("m", demo, fast, UserOptions()).decode.bound


@pytest.mark.parametrize("machine", [NO_GPU, DESKTOP, EPYC])
def test_twice_the_bandwidth_is_never_slower_and_at_most_twice_as_fast(machine):
    facts = REGISTRY.find("qwen3-30b-a3b-fp8").facts()
    faster = replace(machine, limits=replace(machine.limits, read=2 * machine.limits.read))
    slow, fast = (make_plan("m", facts, m, UserOptions()).decode.tokens_per_second for m in (machine, faster))
    assert slow < fast <= 2 * slow


def test_no_token_is_expected_faster_than_memory_allows():
    for entry in REGISTRY.entries:
        if "num_hidden_layers" not in str(entry.config) or entry.facts().total_bytes > 120e9:
            continue
        facts = entry.facts()
        read = facts.expert_bytes * facts.sizes.top_k / facts.sizes.experts
        made = make_plan("m", facts, NO_GPU, UserOptions())
        assert made.decode.tokens_per_second < NO_GPU.limits.read / read, entry.name
