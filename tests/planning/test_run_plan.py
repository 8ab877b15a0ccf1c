"""A plan must fit the machine it is for, be sensible there, and refuse, with a way out, what cannot fit."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from machines import DESKTOP, EPYC, GB, GROUP, MACHINES, NO_GPU, XEON, gpu

from kt_kernel.planning.errors import DoesNotFitError
from kt_kernel.planning.machine_facts import MachineFacts
from kt_kernel.planning.model_facts import GGUF, ModelFacts
from kt_kernel.planning.plan import Fit, Plan, Preferences, make_plan
from kt_kernel.planning.registry import Registry, shipped_entries
from kt_kernel.planning.render import WIDTH, plan_text
from kt_kernel.planning.user_options import UserOptions

REGISTRY = Registry(shipped_entries())  # whatever the user of this machine has added
# Sizes that are known.
PLANNABLE = [entry for entry in REGISTRY.entries if "num_hidden_layers" in str(entry.config)]


def facts(name: str) -> ModelFacts:
    entry = REGISTRY.find(name)
    assert entry is not None, name
    return entry.facts()


def plan(name: str, machine, *options: str, preferences: Preferences = Preferences()) -> Plan:  # noqa: B008
    return make_plan(name, facts(name), machine, UserOptions(options), preferences)


def as_gguf(model: ModelFacts, bits: float) -> ModelFacts:
    """The same model in a GGUF file."""
    weights = model.sizes.moe_layers * model.sizes.experts * model.sizes.expert_parameters
    return replace(
        model, container=GGUF, method="LLAMAFILE", dense_format="Q4_K", expert_bytes=int(weights * bits / 8)
    )


def used(made: Plan) -> dict[str, float]:
    total: dict[str, float] = {}
    for row in made.rows:
        total[row.place] = total.get(row.place, 0) + row.bytes
    return total


def assert_fits(made: Plan) -> None:
    taken = used(made)
    for place, size in taken.items():
        if place != "disk":
            assert 0 < size <= made.capacities[place], (place, size)
    in_ram = sum(size for place, size in taken.items() if place.startswith("RAM"))
    assert in_ram <= 0.98 * made.capacities["RAM"]


@pytest.mark.parametrize("name", [entry.name for entry in PLANNABLE])
@pytest.mark.parametrize("machine", MACHINES)
def test_every_model_fits_or_is_refused_with_figures(name, machine):
    try:
        made = plan(name, MACHINES[machine])
    except DoesNotFitError as error:
        assert error.missing > 0
        assert re.search(r"needs [\d.]+ GB, [\d.]+ GB are available, [\d.]+ GB too little", str(error))
        assert error.would_fit or "a smaller model" in str(error)
    else:
        assert_fits(made)
        assert made.decode.tokens_per_second > 0 and made.prefill.tokens_per_second > 0
        assert all(len(line) <= WIDTH for line in plan_text(made).splitlines())
        experts = sum(
            row.bytes for row in made.rows if row.what.startswith("experts (") and "RAM" in row.place
        )
        assert experts == pytest.approx(made.facts.expert_bytes)


_NO_MXFP4 = {"--kt-num-gpu-experts": "0", "--moe-runner-backend": "triton"}
_MXFP4 = {"--kt-num-gpu-experts": r"[1-9]\d", "--moe-runner-backend": "marlin"}

# machine, model, flags that must be chosen, flags that must not, least and most tokens/s of decoding
SENSIBLE = [
    # 671 GB of FP8 over two nodes, 8.5 GB of dense weights on each 4090: long prompts are streamed, the
    # rest of the GPUs' memory is for the KV cache and not for an expert of each of 58 layers.
    ("xeon", "DeepSeek-V3-0324", {"--tp-size": "2"}, [], 8, 22),
    ("xeon", "Kimi-K2-Thinking", {"--tp-size": "2"}, [], 10, 30),
    ("xeon", "Qwen3-30B-A3B", {"--tp-size": "2", "--kt-num-gpu-experts": r"[2-9]\d"}, [], 50, 250),
    ("epyc", "DeepSeek-V3-0324", {"--kt-num-gpu-experts": r"\d"}, ["--tp-size"], 8, 25),
    ("epyc", "Qwen3-235B-A22B-FP8", {"--max-total-tokens": r"\d{5}"}, ["--tp-size"], 15, 40),
    ("desktop", "Qwen3-30B-A3B-FP8", {"--kt-num-gpu-experts": r"\d\d?"}, ["--tp-size"], 15, 50),
    # Experts with biases are not copied. On these GPUs SGLang has no kernels that compute some of gpt-oss's.
    ("desktop", "gpt-oss-20b", _NO_MXFP4, ["--kt-gpu-prefill-token-threshold"], 20, 100),
    ("xeon", "gpt-oss-120b", _NO_MXFP4, ["--kt-gpu-prefill-token-threshold"], 20, 200),
    ("epyc", "gpt-oss-120b", _MXFP4, ["--kt-gpu-prefill-token-threshold"], 20, 200),
    ("no-gpu", "Qwen3-30B-A3B", {}, ["--tp-size", "--kt-num-gpu-experts", "--chunked-prefill-size"], 5, 12),
    ("no-gpu", "gpt-oss-120b", {}, ["--kt-gpu-prefill-token-threshold"], 6, 15),
    ("group", "Qwen3-30B-A3B-GPTQ-Int4", {}, ["--kt-num-gpu-experts"], 4, 14),
]


@pytest.mark.parametrize(("machine", "name", "chosen", "absent", "least", "most"), SENSIBLE)
def test_choices_are_sensible(machine, name, chosen, absent, least, most):
    made = plan(name, MACHINES[machine])
    assert_fits(made)
    for flag, pattern in chosen.items():
        assert re.fullmatch(pattern, made.flags[flag][0]), (flag, made.flags)
    for flag in absent:
        assert flag not in made.flags
    assert least < made.decode.tokens_per_second < most, made.decode


def test_experts_are_shared_out_over_numa_nodes():
    places = [row.place for row in plan("DeepSeek-V3-0324", XEON).rows if row.what == "experts (FP8)"]
    assert places == ["RAM node 0", "RAM node 1"]
    one = plan("Qwen3-30B-A3B", XEON, "--kt-numa-nodes", "1", "--tp-size", "1")
    assert [row.place for row in one.rows if row.what == "experts (BF16)"] == ["RAM node 1"]


@pytest.mark.parametrize(
    ("options", "nodes"),
    [
        (["--kt-threadpool-count", "1"], [0]),
        (["--kt-numa-nodes=1"], [1]),
        (["--kt-numa-nodes", "0", "1", "--kt-numa-nodes", "1", "--tp-size", "1"], [1]),
        (["--kt-numa-nodes", "1", "0"], [0, 1]),
        (["--kt-threadpool-count", "2"], [0, 1]),
    ],
)
def test_experts_are_planned_where_the_server_puts_them(options, nodes):
    made = plan("Qwen3-30B-A3B", XEON, *options)
    assert [row.place for row in made.rows if row.what == "experts (BF16)"] == [
        f"RAM node {n}" for n in nodes
    ]


def test_states_of_linear_attention_take_memory():
    (row,) = (
        r for r in plan("Qwen3-Next-80B-A3B-Instruct", XEON, "--device", "cpu").rows if "states" in r.what
    )
    per_state = 36 * (32 * 128 * 128 * 4 + 3 * 8192 * 2)
    assert row.what == f"states of requests, {(4 << 30) // per_state}"
    assert row.bytes == pytest.approx(4 << 30, rel=0.05)
    fewer = plan("Qwen3-Next-80B-A3B-Instruct", XEON, "--device", "cpu", "--max-mamba-cache-size", "20")
    assert [r.bytes for r in fewer.rows if "states" in r.what] == [21 * per_state]
    beside_gpu = plan("Qwen3-Next-80B-A3B-Instruct", EPYC)
    assert beside_gpu.flags["--max-mamba-cache-size"] == [str(beside_gpu.gpu.states.number)]


def test_streaming_starts_where_the_bus_beats_the_cpu():
    """The slower the CPU multiplies, the shorter the prompts for which copying all experts pays."""
    fast = plan("Qwen3-235B-A22B-FP8", EPYC)
    slow = plan("Qwen3-235B-A22B-FP8", replace(EPYC, limits=replace(EPYC.limits, bf16=3e12)))
    assert 0 < slow.gpu.threshold < fast.gpu.threshold or fast.gpu.threshold == 0
    assert slow.flags["--kt-gpu-prefill-token-threshold"] == [str(slow.gpu.threshold)]


def static_share(made: Plan) -> float:
    """What SGLang would do (srt/arg_groups/memory_hook.py), without its graphs, whose share is small."""
    if "--mem-fraction-static" in made.flags:
        return float(made.flags["--mem-fraction-static"][0])
    total = made.machine.gpus[0].memory_bytes / 2**20
    reserved = 512 + 1.5 * max(made.gpu.chunk, 2048) + made.gpu.ranks / 8 * 1024
    return round((total - reserved) / total, 3)


def with_gpu(gigabytes: float) -> MachineFacts:
    return replace(EPYC, gpus=(gpu(0, "NVIDIA H100", gigabytes, 5, (9, 0)),))


@pytest.mark.parametrize(
    "machine", [XEON, EPYC, DESKTOP, with_gpu(48), with_gpu(85)], ids=["2x24", "32", "12", "48", "85"]
)
@pytest.mark.parametrize("name", [entry.name for entry in PLANNABLE])
def test_sglang_has_room_for_the_planned_kv_cache(machine, name):
    """It gives the cache what is free after loading, less the share that is not static."""
    try:
        made = plan(name, machine)
    except DoesNotFitError:
        return
    share, held = static_share(made), made.gpu
    assert 0 < share < 1
    for context in (0, 1.5e9):  # whatever CUDA took before SGLang looked
        free = min(g.free_bytes for g in machine.gpus) - context
        weights = held.dense + held.states.bytes + held.streamed + held.expert_bytes
        assert free - weights - (1 - share) * free >= held.kv_bytes - 1
    rounded = 1e-3 * free
    assert (1 - share) * free + rounded >= held.chunk * held.prefill.activation_bytes_per_token


def test_experts_that_all_stay_on_the_gpu_are_not_streamed():
    made = plan("Qwen3-30B-A3B-FP8", with_gpu(85))
    assert made.flags["--kt-num-gpu-experts"] == ["128"]
    assert "--kt-gpu-prefill-token-threshold" not in made.flags and made.gpu.streamed == 0


@pytest.mark.parametrize("option", ["--pp-size", "--data-parallel-size"])
def test_gpus_that_the_user_shares_out_otherwise_are_not_shared_out_again(option):
    assert "--tp-size" not in plan("Qwen3-30B-A3B-FP8", XEON, option, "2").flags


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        (["--kt-num-gpu-experts", "3"], "--kt-num-gpu-experts"),
        (["--max-total-tokens=4096"], "--max-total-tokens"),
        (["--tp", "1"], "--tp-size"),
        (["--kt-gpu-prefill-token-threshold", "0"], "--kt-gpu-prefill-token-threshold"),
    ],
)
def test_what_the_user_gives_is_planned_with_and_not_given_again(options, flag):
    made = plan("Qwen3-30B-A3B", XEON, *options)
    assert flag not in made.flags
    assert_fits(made)


def test_user_may_leave_the_gpu_alone():
    made = plan("Qwen3-30B-A3B", XEON, "--device", "cpu")
    assert made.gpu is None and not any(row.place.startswith("GPU") for row in made.rows)


def test_recorded_statistics_decide_which_experts_the_gpu_holds():
    recorded = Preferences(statistics="/s/counts.pt")
    made = plan("Qwen3-30B-A3B-FP8", DESKTOP, preferences=recorded)
    assert made.flags["--init-expert-location"] == ["/s/counts.pt"]
    assert made.flags["--kt-expert-placement-strategy"] == ["frequency"]
    assert "--init-expert-location" not in plan("gpt-oss-120b", NO_GPU, preferences=recorded).flags


def test_parsers_and_flags_of_the_registry_are_given_unless_the_user_does():
    said = Preferences(tool_call_parser="qwen25", reasoning_parser="qwen3", flags=("--page-size 64", "--x"))
    made = plan("Qwen3-30B-A3B", NO_GPU, "--reasoning-parser", "other", preferences=said)
    assert made.flags == {"--tool-call-parser": ["qwen25"], "--page-size": ["64"], "--x": []}


def test_context_is_shortened_before_a_model_is_refused():
    tight = replace(NO_GPU, available_bytes=66 * GB)
    made = plan("Qwen3-30B-A3B", tight)
    assert (
        int(made.flags["--max-total-tokens"][0]) == made.kv_tokens < plan("Qwen3-30B-A3B", NO_GPU).kv_tokens
    )
    assert_fits(made)


# ---- refusals --------------------------------------------------------------------------------------


def refusal(model: ModelFacts, machine, *options: str) -> DoesNotFitError:
    with pytest.raises(DoesNotFitError) as caught:
        make_plan("m", model, machine, UserOptions(options))
    return caught.value


def test_refusal_says_by_how_much_and_that_four_bits_would_fit():
    error = refusal(facts("Qwen3-30B-A3B"), GROUP)
    assert error.place == "main memory"
    assert 25 * GB < error.missing < 40 * GB
    assert any("kt quant --method int4" in way for way in error.would_fit)
    converted = replace(facts("Qwen3-30B-A3B"), method="AMXINT4", expert_bytes=int(29e9 * 4.25 / 8))
    assert_fits(make_plan("m", converted, GROUP, UserOptions()))


def test_largest_gguf_that_would_fit_does_fit():
    model = facts("GLM-4.5-Air")
    error = refusal(model, DESKTOP, "--device", "cpu")
    bits = float(re.search(r"at most ([\d.]+) bits", str(error))[1])
    assert_fits(make_plan("m", as_gguf(model, bits), DESKTOP, UserOptions(("--device", "cpu"))))


def test_mapped_gguf_is_offered_and_fits():
    model = as_gguf(facts("GLM-4.5-Air"), 8.5)
    error = refusal(model, replace(NO_GPU, available_bytes=64 * GB))
    assert any(way.startswith("--kt-gguf-mmap") for way in error.would_fit)
    mapped = make_plan("m", model, DESKTOP, UserOptions(("--kt-gguf-mmap", "--device", "cpu")))
    assert_fits(mapped)
    assert used(mapped)["disk"] == model.expert_bytes


def test_too_many_gpu_experts_are_refused_with_the_number_that_fits():
    error = refusal(facts("Qwen3-30B-A3B-FP8"), DESKTOP, "--kt-num-gpu-experts", "100")
    assert error.place.startswith("GPU 0")
    fitting = re.search(r"--kt-num-gpu-experts (\d+)", error.would_fit[0])[1]
    assert_fits(plan("Qwen3-30B-A3B-FP8", DESKTOP, "--kt-num-gpu-experts", fitting))


def test_dense_weights_that_the_gpu_cannot_hold_are_refused():
    error = refusal(facts("DeepSeek-V3-0324"), replace(EPYC, gpus=DESKTOP.gpus))
    assert error.place == "GPU 0"
    assert any("GPUs with" in way for way in error.would_fit)


def test_small_numa_node_is_refused():
    first, second = XEON.nodes
    lopsided = replace(XEON, nodes=(first, replace(second, available_bytes=100 * GB)))
    assert refusal(facts("DeepSeek-V3-0324"), lopsided).place == "NUMA node 1"


def test_force_plans_what_does_not_fit():
    made = make_plan("m", facts("Qwen3-30B-A3B"), GROUP, UserOptions(), fit=Fit.PLAN_ALL_THE_SAME)
    assert "It does not fit" in made.notes[0]


def test_half_of_the_threads_multiply_half_as_much():
    whole = plan("Qwen3-30B-A3B", NO_GPU).prefill.tokens_per_second
    half = plan("Qwen3-30B-A3B", NO_GPU, "--kt-cpuinfer", "8").prefill.tokens_per_second
    assert half == pytest.approx(whole / 2, rel=0.1)
