"""`kt bench` must count what it says it counts, and judge by the targets; how fast it is here is no test."""

from __future__ import annotations

import dataclasses
import itertools
import json
from types import SimpleNamespace

import pytest
import speed_table
from typer.testing import CliRunner

from kt_kernel import kt_kernel_ext
from kt_kernel.bench import limits, measure, shapes
from kt_kernel.bench.layer import RandomLayer
from kt_kernel.bench.measure import Effort, measure_method, peak_limit
from kt_kernel.bench.report import verdict
from kt_kernel.bench.targets import Target, gguf_target, target_for
from kt_kernel.cli import bench, busy_cores
from kt_kernel.cli.main import app

TINY = shapes.Shape("S", hidden=256, intermediate=128, experts=4, top_k=2)
LIMITS = {
    name: {"how": "made up", "per_second": 1e9}
    for name in ("read", "bf16_dot", "int8_dot", "int8_widened", "f32_fma")
}

# Codes and scales of one expert of the shape TINY, in bits per weight.
BITS_PER_WEIGHT = {
    "BF16": 16,
    "FP8": 8 + 32 / 128**2,
    "FP8_PERCHANNEL": 8 + 32 * (2 / 256 + 1 / 128) / 3,
    "MXFP8": 8 + 8 / 32,
    "RAWINT4": 4 + 16 / 32,
    "GPTQ_INT4": 4 + 16 / 128,
    "AMXINT4": 4 + 32 / 32,
    "MOE_INT4": 4 + 32 / 32,
    "AMXINT8": 8 + 32 * (2 / 256 + 1 / 128) / 3,
    "MOE_INT8": 8 + 32 * (2 / 256 + 1 / 128) / 3,
    "MXFP4": 4 + 8 / 32,
    "NVFP4": 4 + 8 / 16 + 3 * 32 / TINY.expert_elements,
    "LLAMAFILE": 8 + 16 / 32,
}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """`kt bench --shape S` measures a layer and a stretch of memory that take milliseconds."""
    monkeypatch.setitem(shapes.SHAPES, "S", TINY)
    monkeypatch.setattr(limits, "READ_BYTES", 2**22)
    monkeypatch.setattr(limits, "_REPEATS", 1)
    monkeypatch.setattr(measure, "QUICK", Effort(rounds=2, seconds=0, least=1))


def kt_bench(*options: str):
    return CliRunner().invoke(app, ["bench", *options], env={"COLUMNS": "200"})


def test_json_has_a_line_for_every_method_and_token_count(tiny):
    result = kt_bench("--json", "--tokens", "16,1", "--threads", "1")
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(row["method"], row["tokens"]) for row in rows] == [
        (method, tokens) for method in kt_kernel_ext.METHODS for tokens in (1, 16)
    ]
    for row in rows:
        assert row["threads"] == 1 and row["shape"] == "S" and row["calls"] == 2
        assert row["ms"] > 0 and row["verdict"] in ("good", "below target", "-")
        assert row["share_of_roof"] == max(row["share_of_read"], row["share_of_peak"]) > 0
        read = row["limits"]["read"]["per_second"]
        assert row["gigabytes_per_second"] * 1e9 / read == pytest.approx(row["share_of_read"])


def test_table_has_a_line_for_every_measurement_within_80_columns(tiny):
    result = kt_bench("--tokens", "1,3")
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.splitlines())) <= 80
    chosen = [
        [row["method"], row["kernel"], tokens]
        for row in kt_kernel_ext.dispatch_table()
        if row["state"] == "chosen" and row["format"] in (row["method"], "Q8_0")
        for tokens in ("1", "3")
    ]
    lines = [line.split() for line in result.stdout.splitlines()]
    assert [line[:3] for line in lines if line and line[0] in kt_kernel_ext.METHODS] == chosen
    assert all(line[7:] for line in lines if line[:3] in chosen), "a verdict is missing"


def test_ctrl_c_keeps_what_was_measured(tiny, monkeypatch):
    def measure_two(method, *arguments):
        if method == kt_kernel_ext.METHODS[2]:
            raise KeyboardInterrupt
        return measure_method(method, *arguments)

    monkeypatch.setattr(measure, "measure_method", measure_two)
    result = kt_bench("--json", "--tokens", "1")
    assert result.exit_code == 130
    assert [json.loads(line)["method"] for line in result.stdout.splitlines()] == list(kt_kernel_ext.METHODS)[
        :2
    ]
    assert f"stopped after 2 of {len(kt_kernel_ext.METHODS)} methods" in result.stderr


def test_the_time_is_said_and_kept(tiny, monkeypatch):
    """Methods that take 30 s each, or 10 in one round: less of each where time gets short, then no more."""
    now, rounds = [0.0], []

    def measure_slowly(method, shape, tokens, threads, effort):
        rounds.append(effort.rounds)
        now[0] += 30 if effort.rounds > 1 else 10
        return []

    monkeypatch.setattr(measure, "measure_method", measure_slowly)
    monkeypatch.setattr(bench, "time", SimpleNamespace(monotonic=lambda: now[0]))
    result = kt_bench("--tokens", "1")
    assert result.exit_code == 0
    count = len(kt_kernel_ext.METHODS)
    assert f"measuring {count} methods; none is begun that would end after 120 s" in result.stderr
    assert rounds[0] > 1 and rounds[1:] == [1] * (len(rounds) - 1) and len(rounds) > 5
    assert 100 < now[0] <= 120
    assert f"120 s are over before {kt_kernel_ext.METHODS[len(rounds)]}, " in result.stderr
    assert f"--method {kt_kernel_ext.METHODS[-1]}" in result.stderr


def test_named_methods_are_all_measured(tiny, monkeypatch):
    now = itertools.count(0, 1000.0)
    monkeypatch.setattr(bench, "time", SimpleNamespace(monotonic=lambda: next(now)))
    result = kt_bench("--json", "--tokens", "1", "--method", "FP8", "--method", "MXFP4")
    assert [json.loads(line)["method"] for line in result.stdout.splitlines()] == ["FP8", "MXFP4"]


def test_other_programs_on_the_cores_are_mentioned(tiny, monkeypatch):
    stats = iter(["cpu 0 0\ncpu0 5 0 5 90 0 0 0 0 0 0\ncpu7 0 0 0 9 0", "cpu0 95 0 15 90 0\ncpu7 0 0 0 99 0"])
    monkeypatch.setattr(busy_cores, "_STAT", SimpleNamespace(read_text=lambda: next(stats)))
    monkeypatch.setattr(busy_cores.os, "sched_getaffinity", lambda process: {0, 7})
    monkeypatch.setattr(busy_cores.time, "sleep", lambda seconds: None)
    assert "other programs keep 1.0 of 2 cores busy" in busy_cores.warning()


def test_waiting_for_a_disk_is_not_busy():
    before, after = (
        busy_cores.read_ticks(text) for text in ("cpu0 1 1 1 1 1 0 0 0", "cpu0 1 1 1 51 51 0 0 0")
    )
    assert busy_cores.busy_cores(before, after, {0}) == 0.0


def test_one_method_can_be_chosen(tiny):
    result = kt_bench("--json", "--tokens", "2", "--method", "FP8", "--method", "MXFP4", "--method", "FP8")
    assert [json.loads(line)["method"] for line in result.stdout.splitlines()] == ["FP8", "MXFP4"]


@pytest.mark.parametrize(
    ("options", "seen", "expected"),
    [
        (["--method", "INT3"], "INT3", "NVFP4"),
        (["--shape", "XL"], "XL", "S, L"),
        (["--tokens", "1,0"], "1,0", "1,16,1024"),
        (["--tokens", "few"], "few", "1,16,1024"),
        (["--tokens", ""], "''", "1,16,1024"),
    ],
)
def test_impossible_options_are_one_sentence(options, seen, expected):
    result = kt_bench(*options)
    assert result.exit_code == 1
    assert result.stderr.startswith("kt: ") and len(result.stderr.splitlines()) == 1
    assert seen in result.stderr and expected in result.stderr


def test_defaults_are_all_methods_on_all_cores():
    chosen = bench.plan((), "S", "16,1,16", None)
    assert chosen.methods == tuple(kt_kernel_ext.METHODS) and chosen.tokens == (1, 16) and chosen.threads >= 1


@pytest.mark.parametrize("method", kt_kernel_ext.METHODS)
def test_bytes_are_those_of_a_checkpoint_with_scales(method):
    layer = RandomLayer(method, TINY, threads=1, max_tokens=1)
    assert 8 * layer.expert_bytes / TINY.expert_elements == pytest.approx(BITS_PER_WEIGHT[method])


def test_every_slot_is_memory_of_its_own():
    one, four = (
        RandomLayer("FP8", dataclasses.replace(TINY, experts=n, top_k=1), threads=1, max_tokens=1)
        for n in (1, 4)
    )
    assert four.moe.weight_bytes >= 4 * one.moe.weight_bytes * 0.9


def test_a_moment_of_slowness_does_not_count():
    def at(per_second: float) -> dict:
        return {"read": {"how": "made up", "per_second": per_second}}

    assert limits.median_limits([at(2.0), at(0.1), at(3.0)]) == at(2.0)


def test_shares_follow_from_the_limits(monkeypatch):
    monkeypatch.setattr(measure, "measure_limits", lambda engine: LIMITS)
    # Four experts, two per token: 64 tokens use all of them.
    (row,) = measure_method("BF16", TINY, [64], 1, Effort(rounds=3, seconds=0, least=1))
    seconds = row.ms / 1e3
    assert row.share_of_read == pytest.approx(4 * TINY.expert_elements * 2 / 1e9 / seconds)
    assert row.share_of_peak == pytest.approx(2 * 64 * 2 * TINY.expert_elements / 1e9 / seconds)
    assert row.target is None and verdict([row]) == "-"


@pytest.mark.parametrize(
    ("activations", "kernel", "limit"),
    [
        ("bf16", "code4.avx2", "bf16_dot"),
        ("int8", "code6_int8.avx2", "int8_dot"),
        ("int8", "int8_int8.avx2", "int8_widened"),
        ("int8", "code4wide_int8.avx512", "int8_widened"),
    ],
)
def test_arithmetic_is_a_share_of_the_peak_of_its_own_products(activations, kernel, limit):
    assert peak_limit(activations, kernel) == limit


@pytest.mark.parametrize(("seconds", "calls"), [(0, 2), (1e9, 7)])
def test_calls_of_a_round_go_on_until_their_time_or_number_is_reached(monkeypatch, seconds, calls):
    monkeypatch.setattr(measure, "measure_limits", lambda engine: LIMITS)
    (row,) = measure_method("BF16", TINY, [1], 1, Effort(rounds=3, seconds=seconds, least=2, most=7))
    assert row.calls == 3 * calls


def test_calls_of_a_round_follow_each_other_directly(monkeypatch):
    monkeypatch.setattr(measure, "measure_limits", lambda engine: LIMITS)
    pauses = []
    monkeypatch.setattr(measure.time, "sleep", pauses.append)
    measure_method("BF16", TINY, [1], 1, Effort(rounds=3, seconds=1e9, least=2, most=7))
    assert len(pauses) == 3


@pytest.mark.parametrize(
    ("kernel", "bits", "shape", "tokens", "target"),
    [
        ("bf16.avx512", 16, "L", 1, Target("read", 0.75)),
        ("e4m3.avx512_bf16", 8.25, "S", 1, Target("read", 0.75)),
        ("code4.avx512_bf16", 4.5, "S", 1, Target("read", 0.70)),
        ("e4m3.avx2", 8.25, "S", 1, Target("read", 0.50)),
        ("code4.avx2", 4.5, "L", 1, Target("read", 0.35)),
        ("code4.avx512", 4.5, "S", 16, Target("roof", 0.60)),
        ("code4.avx512", 4.5, "L", 16, None),
        ("code4.avx2", 4.5, "S", 16, None),
        ("e4m3.avx512", 8.25, "S", 1024, Target("peak", 0.60)),
        ("e4m3.avx512", 8.25, "L", 1024, Target("peak", 0.75)),
        ("bf16.avx2", 16, "L", 1024, Target("peak", 0.55)),
        ("bf16.avx512", 16, "S", 64, None),
        ("code4_int8.avx2", 4.5, "S", 1, Target("read", 0.70)),
        ("code4_int8.avx512_vnni", 4.5, "L", 1, Target("read", 0.80)),
        ("int8_int8.avx2", 8.25, "S", 1, Target("read", 0.80)),
        ("code4_int8.avx2", 4.5, "S", 16, Target("roof", 0.65)),
        ("code4_int8.avx2", 4.5, "L", 1024, Target("peak", 0.60)),
        ("int8_int8.avx512_vnni", 8.25, "L", 1024, Target("peak", 0.70)),
        ("code4_int8.avx512_vnni", 4.5, "S", 1024, Target("peak", 0.55)),
    ],
)
def test_targets(kernel, bits, shape, tokens, target):
    activations = "int8" if "_int8." in kernel else "bf16"
    assert target_for(kernel, bits, shape, tokens, activations) == target


@pytest.mark.parametrize(
    ("kernel", "ggml_type", "shape", "tokens", "target"),
    [
        ("int8_int8.avx512_vnni", "Q8_0", "S", 1, Target("read", 0.75)),
        ("code6_int8.avx512_vnni", "Q6_K", "L", 1, Target("read", 0.70)),
        ("code4_int8.avx2", "Q4_K", "S", 1, Target("read", 0.60)),
        ("code4_int8.avx2", "Q4_K", "S", 1024, Target("peak", 0.50)),
        ("code5_int8.avx512", "Q5_K", "L", 1024, Target("peak", 0.65)),
        ("code5_int8.avx512", "Q5_K", "L", 64, None),
        ("code2_int8.avx2", "Q2_K", "S", 1, None),
        ("blocks.avx2", "Q4_K", "S", 1, None),
    ],
)
def test_targets_of_gguf_types(kernel, ggml_type, shape, tokens, target):
    assert gguf_target(kernel, ggml_type, shape, tokens) == target


@pytest.mark.parametrize(("share", "word"), [(0.80, "good"), (0.75, "good"), (0.74, "below target")])
def test_one_row_below_its_target_decides(monkeypatch, share, word):
    monkeypatch.setattr(measure, "measure_limits", lambda engine: LIMITS)
    (row,) = measure_method("BF16", TINY, [2], 1, Effort(rounds=1, seconds=0, least=1))
    good = dataclasses.replace(row, target=Target("peak", 0.6), share_of_peak=0.9)
    judged = dataclasses.replace(row, target=Target("read", 0.75), share_of_read=share, share_of_peak=9.0)
    assert verdict([good, row, judged]) == word


def test_table_of_a_document_marks_what_is_missed_and_what_lost_to_bf16():
    common = {
        "method": "RAWINT4",
        "format": "RAWINT4",
        "kernel": "code4_int8.avx2",
        "activations": "int8",
        "shape": "S",
    }
    shares = {"share_of_read": 0.6, "share_of_peak": 0.1}
    below = {"target": {"limit": "read", "share": 0.7}, "verdict": "below target", "other_ms": {"bf16": 1.0}}
    good = {"target": None, "verdict": "-", "other_ms": {"bf16": 9.0}}
    rows = [
        common | shares | below | {"tokens": 1, "ms": 2.0},
        common | shares | good | {"tokens": 16, "ms": 2.5},
    ]
    assert speed_table.table(rows).splitlines()[0] == "| method | activations | kernel | S, 1 | S, 16 |"
    assert speed_table.table(rows).splitlines()[2] == (
        "| `RAWINT4` | int8 | `code4_int8.avx2` | 2 ms, 60% of read! slow | 2.5 ms, 60% of read |"
    )
