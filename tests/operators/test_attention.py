"""Attention over the paged cache: right with every option, and the same bits however tokens arrive.

The reference is the torch twin in float64 (kt_kernel/operators/reference/attention.py). Slots that no query
of a sequence sees hold NaN, so reading one shows.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
import torch

from kt_kernel import kt_kernel_ext, operators
from kt_kernel.operators.reference import attention as reference

native = torch.ops.sgl_kernel

F32, BF16, F16, E4M3 = torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn
# Norm of the error / norm of the result: of fp32 sums, or the one rounding of the result.
ERROR = {F32: 3e-6, BF16: 2.5e-3, F16: 3e-4}
ENGINES = {}


def use_threads(threads: int) -> None:
    """Engines are kept, because torch's registrations outlive the tests."""
    if threads not in ENGINES:
        ENGINES[threads] = kt_kernel_ext.Engine(threads, 1)
    operators.install(ENGINES[threads])


@pytest.fixture(autouse=True)
def engine():
    use_threads(2)


@dataclass
class Case:
    """Sequences of `lengths` positions, the last `new` of which are queries."""

    lengths: tuple[int, ...] = (10, 300, 700)
    new: tuple[int, ...] = (10, 7, 65)
    heads: int = 8
    kv_heads: int = 2
    dim: int = 64
    value_dim: int = 64
    type: torch.dtype = BF16
    cache_type: torch.dtype | None = None
    compressed: bool = False  # values are a part of the keys' rows
    options: dict = field(default_factory=dict)


CASES = {
    "gqa": Case(),
    "gqa_fp32": Case(type=F32),
    "mha_odd_widths": Case(kv_heads=8, dim=72, value_dim=40, type=F16),
    "mqa_wide": Case(kv_heads=1, dim=128, value_dim=128, type=F32, cache_type=BF16),
    "groups_of_five": Case(heads=10, kv_heads=2, dim=96, value_dim=96, type=F32),
    "mla": Case(heads=16, kv_heads=1, dim=96, value_dim=64, compressed=True, type=F32),
    "mla_real_widths": Case(heads=20, kv_heads=1, dim=576, value_dim=512, compressed=True, new=(1, 3, 5)),
    "window": Case(type=F32, options={"window": 100}),
    "window_of_one": Case(type=F32, options={"window": 1}),
    "window_over_blocks": Case(type=F32, heads=4, new=(10, 100, 290), options={"window": 300}),
    "sinks": Case(type=F32, options={"sinks": True}),
    "window_and_sinks": Case(options={"sinks": True, "window": 128}),
    "cap": Case(type=F32, options={"cap": 5.0}),
    "fp8_cache": Case(type=F32, cache_type=E4M3, options={"k_scale": 0.5, "v_scale": 2.0}),
    "tree": Case(lengths=(10, 270, 700), new=(10, 30, 8), type=F32, options={"tree": True}),
    "tree_and_window": Case(
        lengths=(10, 270, 700), new=(10, 30, 8), type=F32, options={"tree": True, "window": 15}
    ),
    "encoder": Case(lengths=(10, 300), new=(10, 300), heads=4, type=F32, options={"causal": False}),
}


class Pool:
    """A cache with the keys and values of a case's sequences in shuffled slots, and NaN everywhere else."""

    def __init__(self, case: Case, seed: int = 5) -> None:
        torch.manual_seed(seed)
        self.case = case
        total = sum(case.lengths)
        cache_type = case.cache_type or case.type
        slots = torch.randperm(2 * total)[:total]
        self.keys = torch.full((2 * total, case.kv_heads, case.dim), float("nan")).to(cache_type)
        self.keys[slots] = torch.randn(total, case.kv_heads, case.dim).to(cache_type)
        if case.compressed:
            self.values = self.keys[..., : case.value_dim]
        else:
            self.values = torch.full((2 * total, case.kv_heads, case.value_dim), float("nan")).to(cache_type)
            self.values[slots] = torch.randn(total, case.kv_heads, case.value_dim).to(cache_type)
        self.table = torch.full((len(case.lengths) + 2, max(case.lengths) + 3), -1, dtype=torch.int32)
        self.rows = torch.randperm(len(case.lengths) + 2)[: len(case.lengths)]
        for row, part in zip(self.rows, slots.split(list(case.lengths)), strict=True):
            self.table[row, : len(part)] = part.int()
        # A slice of wider rows, as the queries of one qkv tensor are.
        width = case.heads * case.dim
        qkv = torch.randn(sum(case.new), width + 48).to(case.type)
        self.q = 2 * qkv
        self.q = self.q[:, 32 : 32 + width].unflatten(1, (case.heads, case.dim))
        self.sinks = 2 * torch.randn(case.heads).to(BF16)
        self.trees = [(torch.rand(n, n) < 0.5).tril() | torch.eye(n, dtype=torch.bool) for n in case.new]

    def slots(self, sequence: int) -> torch.Tensor:
        return self.table[self.rows[sequence], : self.case.lengths[sequence]].long()

    def numbers(self) -> tuple:
        """scaling, cap, cross attention, window, encoder lengths, sinks."""
        options = self.case.options
        sinks = self.sinks if options.get("sinks") else None
        window = options.get("window", 0)
        return self.case.dim**-0.5, options.get("cap", 0.0), False, window, None, sinks

    def scales(self) -> tuple[float, float]:
        return self.case.options.get("k_scale", 1.0), self.case.options.get("v_scale", 1.0)

    def empty(self, rows: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        out = torch.full((rows, self.case.heads, self.case.value_dim), float("nan"))
        return out.to(dtype or self.case.type)

    def extend(self, operator, parts: list[tuple[int, int, int]], dtype=None) -> torch.Tensor:
        """Results of queries [first, last) of sequences, parts of (sequence, first, last), in one call."""
        case = self.case
        starts = torch.tensor(case.new).cumsum(0) - torch.tensor(case.new)
        rows = [torch.arange(starts[s] + first, starts[s] + last) for s, first, last in parts]
        new = torch.tensor([last - first for _, first, last in parts], dtype=torch.int32)
        lengths = torch.tensor([case.lengths[s] - case.new[s] + last for s, _, last in parts])
        tree = None
        if case.options.get("tree"):
            # Longer than what is used, as SGLang's buffer is.
            tree = torch.cat(
                [self.trees[s].flatten() for s, _, _ in parts] + [torch.zeros(9, dtype=torch.bool)]
            )
        q = self.q if len(parts) == len(case.new) else self.q[torch.cat(rows)]
        out = self.empty(len(q), dtype)
        sequences = torch.tensor([s for s, _, _ in parts])
        operator(
            q, None, None, out, self.keys, self.values, *self.scales(), self.table, self.rows[sequences],
            lengths, new, (new.cumsum(0) - new).int(), int(new.max()), *self.numbers(), tree,
            case.options.get("causal", True),
        )  # fmt: skip
        return out

    def all(self, operator, dtype=None) -> torch.Tensor:
        return self.extend(operator, [(s, 0, new) for s, new in enumerate(self.case.new)], dtype)

    def decode(self, sequences: list[int], tokens: list[int]) -> torch.Tensor:
        """Query `tokens[i]` of the new ones of each sequence, as a step of decoding; nothing is written."""
        case = self.case
        starts = torch.tensor(case.new).cumsum(0) - torch.tensor(case.new)
        pairs = list(zip(sequences, tokens, strict=True))
        return self.step(
            query=self.q[torch.tensor([int(starts[s]) + t for s, t in pairs])],
            req_pool_indices=self.rows[torch.tensor(sequences)],
            seq_lens=torch.tensor([case.lengths[s] - case.new[s] + t + 1 for s, t in pairs]),
        )

    def step(self, **changes) -> torch.Tensor:
        """A decoding step of all sequences, with some arguments replaced."""
        scaling, cap, cross, window, encoder_lens, sinks = self.numbers()
        k_scale, v_scale = self.scales()
        arguments = {
            "query": self.q,
            "k_buffer": self.keys,
            "v_buffer": self.values,
            "k_scale": k_scale,
            "v_scale": v_scale,
            "key": None,
            "value": None,
            "loc": None,
            "attn_logits": torch.empty(0),
            "req_to_token": self.table,
            "req_pool_indices": self.rows,
            "seq_lens": torch.tensor(self.case.lengths),
            "sm_scale": scaling,
            "logit_cap": cap,
            "is_cross_attn": cross,
            "sliding_window_size": window,
            "encoder_lens": encoder_lens,
            "sinks": sinks,
            **changes,
        }
        output = self.empty(len(arguments["query"]))
        native.decode_attention_cpu(**arguments, output=output)
        return output

    def all_loc(self) -> torch.Tensor:
        """The slot of each sequence's last position."""
        return torch.stack([self.slots(s)[-1] for s in range(len(self.case.lengths))])


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", CASES)
def test_result_is_that_of_float64(name):
    pool = Pool(CASES[name])
    expected = pool.all(reference.extend_attention_cpu, torch.float64)
    assert error(pool.all(native.extend_attention_cpu), expected) < ERROR[pool.case.type]


@pytest.mark.parametrize("name", [n for n in CASES if not {"tree", "causal"} & set(CASES[n].options)])
def test_token_does_not_depend_on_chunks_neighbours_or_threads(name):
    pool = Pool(CASES[name])
    expected = pool.all(native.extend_attention_cpu)
    for threads in (1, 3):
        use_threads(threads)
        assert torch.equal(pool.all(native.extend_attention_cpu), expected)
    for s, (new, part) in enumerate(zip(pool.case.new, expected.split(list(pool.case.new)), strict=True)):
        use_threads(1 + s)
        cuts = sorted({0, 1, new // 3, new})
        chunks = [pool.extend(native.extend_attention_cpu, [(s, *cut)]) for cut in pairwise(cuts)]
        assert torch.equal(torch.cat(chunks), part)
        for token in {0, new - 1}:
            assert torch.equal(pool.decode([s], [token])[0], part[token])
    last = torch.tensor(pool.case.new).cumsum(0) - 1
    batch = pool.decode([2, 0, 1], [pool.case.new[s] - 1 for s in (2, 0, 1)])
    assert torch.equal(batch, expected[last[[2, 0, 1]]])


def test_chain_of_drafts_is_the_causal_order():
    """A tree that is a chain gives the bits of decoding token by token."""
    pool = Pool(CASES["tree"])
    pool.trees = [torch.ones_like(tree).tril() for tree in pool.trees]
    drafts = pool.all(native.extend_attention_cpu)
    pool.case = Case(**{**pool.case.__dict__, "options": {}})
    assert torch.equal(drafts, pool.all(native.extend_attention_cpu))


def test_later_tokens_that_are_not_finite_leave_earlier_ones_alone():
    pool = Pool(CASES["gqa"])
    expected = pool.all(native.extend_attention_cpu)
    broken = pool.slots(2)[-20:]  # the last 20 positions of the last sequence
    pool.keys[broken], pool.values[broken] = float("inf"), float("nan")
    got = pool.all(native.extend_attention_cpu)
    assert torch.equal(got[:-20], expected[:-20])
    assert got[-20:].isnan().all()


def test_8k_context_against_float64():
    """One decoded token, and 16 at the end of a prompt, with 8192 positions before them."""
    case = Case(
        lengths=(8208, 40),
        new=(16, 1),
        heads=8,
        kv_heads=2,
        dim=128,
        value_dim=128,
        type=F32,
        cache_type=BF16,
    )
    pool = Pool(case)
    expected = pool.all(reference.extend_attention_cpu, torch.float64)
    got = pool.all(native.extend_attention_cpu)
    assert error(got, expected) < ERROR[F32]
    for threads in (1, 2, 5):
        use_threads(threads)
        assert torch.equal(pool.decode([0], [15])[0], got[15])


@pytest.mark.parametrize("cache_type", [BF16, F32])
def test_decode_writes_what_it_is_given_first(cache_type):
    pool = Pool(Case(new=(1, 1, 1), cache_type=cache_type))
    loc = pool.all_loc()
    qkv = torch.randn(3, 256).to(BF16)
    k, v = (part.unflatten(1, (2, 64)) for part in qkv.chunk(2, 1))
    pool.keys[loc], pool.values[loc] = k.to(cache_type), v.to(cache_type)
    expected, keys, values = pool.step(), pool.keys.clone(), pool.values.clone()
    pool.keys[loc], pool.values[loc] = float("nan"), float("nan")
    assert torch.equal(pool.step(key=k, value=v, loc=loc), expected)
    assert torch.equal(pool.keys.nan_to_num(), keys.nan_to_num())
    assert torch.equal(pool.values.nan_to_num(), values.nan_to_num())


def test_decode_with_a_compressed_cache_writes_whole_rows():
    pool = Pool(Case(new=(1, 1, 1), heads=16, kv_heads=1, dim=96, value_dim=64, compressed=True))
    loc = pool.all_loc()
    expected, keys, rows = pool.step(), pool.keys.clone(), pool.keys[loc].clone()
    pool.keys[loc] = float("nan")
    assert torch.equal(pool.step(key=rows, value=rows[..., :64], loc=loc), expected)
    assert torch.equal(pool.keys.nan_to_num(), keys.nan_to_num())


def test_keys_that_a_compressed_cache_cannot_hold_are_attended_to_themselves():
    """A prompt without a prefix, its keys wider and more than those of the cache (DeepSeek's MHA form)."""
    pool = Pool(Case(lengths=(40, 300), new=(40, 300), kv_heads=8, dim=48, value_dim=32, type=F32))
    order = torch.cat([pool.slots(0), pool.slots(1)])
    k, v, cache = pool.keys[order], pool.values[order], torch.full((700, 1, 20), float("nan"))
    new, starts, out = torch.tensor([40, 300]), torch.tensor([0, 40]), pool.empty(340)
    native.extend_attention_cpu(
        pool.q, k, v, out, cache, cache[..., :16], 1.0, 1.0, pool.table, pool.rows, new, new, starts, 300,
        *pool.numbers(), None, True,
    )  # fmt: skip
    assert torch.equal(out, pool.all(native.extend_attention_cpu))


@pytest.mark.parametrize("tokens", [3, 700])
def test_store_cache_writes_strided_rows_and_nothing_else(tokens):
    torch.manual_seed(1)
    qkv = torch.randn(tokens, 3, 4, 32).to(BF16)
    caches = [torch.randn(2 * tokens, 4, 32).to(BF16) for _ in range(2)]
    expected = [cache.clone() for cache in caches]
    slots = torch.randperm(2 * tokens)[:tokens]
    native.store_cache_cpu(qkv[:, 1], qkv[:, 2], *caches, slots, 128)
    reference.store_cache_cpu(qkv[:, 1], qkv[:, 2], *expected, slots, 128)
    assert torch.equal(caches[0], expected[0])
    assert torch.equal(caches[1], expected[1])


def test_rows_without_a_key_are_zero():
    """Padding of a batch: a sequence of no positions."""
    pool = Pool(Case(new=(1, 1, 1)))
    out = pool.step(seq_lens=torch.tensor([0, 300, 700]))
    assert out[0].eq(0).all()
    assert torch.equal(out[1:], pool.decode([1, 2], [0, 0]))


def digest() -> str:
    state = hashlib.sha256()
    for name in ("gqa", "mha_odd_widths", "mla", "window_and_sinks", "cap", "fp8_cache", "tree"):
        state.update(Pool(CASES[name]).all(native.extend_attention_cpu).float().numpy().tobytes())
    return state.hexdigest()


def test_every_instruction_set_gives_the_same_bits():
    environment = {**os.environ, "KT_KERNEL_CPU_VARIANT": "avx2"}
    ran = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, check=True
    )
    assert ran.stdout.strip() == digest()


def test_bad_arguments_are_named():
    pool = Pool(Case(new=(1, 1, 1)))
    bad = {
        "encoder": {"is_cross_attn": True},
        "sinks": {"sinks": torch.zeros(3)},
        "seq_lens": {"seq_lens": torch.zeros(3)},
        "queries": {"query": pool.q.double()},
        "keys": {"k_buffer": pool.keys[..., :32]},
        "slot": {"key": pool.keys[:3], "value": pool.values[:3], "loc": torch.tensor([0, 1, 10**6])},
    }
    for word, change in bad.items():
        with pytest.raises(ValueError, match=word):
            pool.step(**change)


if __name__ == "__main__":
    use_threads(2)
    print(digest())
