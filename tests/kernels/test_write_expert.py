"""Risk: an expert handed to a device (layerwise prefill) differs from the checkpoint's, or lands elsewhere.

write_expert (at once) and submit_write_expert (queued) write one expert for R ranks, each with the
rows [r I/R, (r+1) I/R) of gate, then the same rows of up, and the columns [r I/R, (r+1) I/R) of down, in the
layout of the checkpoint. The expected bytes are cut out of the checkpoint's tensors here. Destinations stand
against guard pages.
"""

from __future__ import annotations

import gc
import math
import threading
from dataclasses import dataclass

import numpy as np
import pytest
from formats import (
    BF16,
    F32,
    FORMATS,
    ONE_PER_METHOD,
    Format,
    Matrix,
    pack,
    to_bf16,
    unpack,
)
from guarded_memory import SIDES, GuardedArray
from harness import (
    Experts,
    arguments,
    build_layer,
    ext,
    load,
    make_layer,
    poisoned,
    random_call,
    random_experts,
    run,
    same_bits,
)
from isolation import isolated

ENGINE = ext.Engine(2)
SLOT = 1  # of three experts: neither the first nor the last
RANKS = (1, 2, 4)
FILL = 0xC3  # every byte of a destination before it is written


# ---- what a rank should get ---------------------------------------------------------------------


def written_scales(format: Format, stored: np.ndarray | None) -> np.ndarray | None:
    """The dtype of scales on a device: fp32 for FP8, bf16 for MXFP4, else as they were loaded."""
    if format.method in ("FP8", "FP8_PERCHANNEL"):
        return format.scale_values(stored).astype(np.float32)
    if format.method == "MXFP4":
        return to_bf16(format.scale_values(stored))
    return stored


def cut(matrix: Matrix, rows: slice, columns: slice) -> tuple[np.ndarray, np.ndarray | None]:
    """(packed codes, scales [blocks of rows, groups of columns]) of a part of expert SLOT."""
    format = matrix.format
    codes = pack(format.method, matrix.codes(SLOT)[rows, columns])
    scales = written_scales(format, matrix.row_scales(SLOT))
    if scales is None:
        return codes, None
    group = format.group_columns(matrix.columns)
    block = slice(rows.start // format.block_rows, -(-rows.stop // format.block_rows))
    groups = slice(columns.start // group, -(-columns.stop // group))
    return codes, scales[block, groups]


@dataclass
class Shard:
    """What one rank gets: contiguous arrays, scales None where the method has none."""

    w13: np.ndarray
    w13_scale: np.ndarray | None
    w2: np.ndarray
    w2_scale: np.ndarray | None

    @property
    def arrays(self) -> list[np.ndarray]:
        return [a for a in (self.w13, self.w13_scale, self.w2, self.w2_scale) if a is not None]


SHARD_FIELDS = ("w13", "w13_scale", "w2", "w2_scale")


def as_shard(arrays: list[np.ndarray]) -> Shard:
    return Shard(*arrays) if len(arrays) == 4 else Shard(arrays[0], None, arrays[1], None)


def expected_shard(experts: Experts, rank: int, ranks: int) -> Shard:
    share = experts.intermediate // ranks
    mine = slice(rank * share, (rank + 1) * share)
    everything = slice(0, experts.hidden)
    gate, gate_scale = cut(experts.gate, mine, everything)
    up, up_scale = cut(experts.up, mine, everything)
    down, down_scale = cut(experts.down, everything, mine)
    # Matrices of GPTQ are [columns, rows]: up follows gate in each row.
    transposed = experts.format.method == "GPTQ_INT4"
    w13 = np.concatenate([gate, up], axis=1 if transposed else 0)
    if down_scale is None:
        return Shard(w13, None, down, None)
    w13_scale = np.concatenate([gate_scale, up_scale])
    w13_scale, down_scale = (s.T if transposed else s for s in (w13_scale, down_scale))
    return Shard(w13, np.ascontiguousarray(w13_scale), down, np.ascontiguousarray(down_scale))


# ---- writing ------------------------------------------------------------------------------------


def address(array: np.ndarray | None) -> int:
    return 0 if array is None else array.ctypes.data


def pointers(shards: list[Shard]) -> list[list[int]]:
    return [[address(getattr(s, name)) for s in shards] for name in SHARD_FIELDS]


def submit_write(layer, shards: list[Shard]) -> None:
    layer.submit_write_expert(SLOT, len(shards), *pointers(shards))


def write_now(layer, shards: list[Shard]) -> None:
    layer.write_expert(SLOT, len(shards), *pointers(shards))


def destination(like: np.ndarray) -> np.ndarray:
    return np.full(like.nbytes, FILL, np.uint8).view(like.dtype).reshape(like.shape)


def destinations(experts: Experts, ranks: int) -> list[Shard]:
    """Arrays like the expected ones, with other contents."""
    shards = [expected_shard(experts, rank, ranks) for rank in range(ranks)]
    return [as_shard([destination(array) for array in shard.arrays]) for shard in shards]


def blocks_stay_whole(size: int, ranks: int, block: int) -> bool:
    """Whether things in each block of a rank's own count come from one block of the whole."""
    share = size // ranks
    block_of_whole = np.arange(size).reshape(ranks, share) // block
    return all(
        (block_of_whole[:, first : first + block] == block_of_whole[:, [first]]).all()
        for first in range(0, share, block)
    )


def can_split(experts: Experts, ranks: int) -> bool:
    format, size = experts.format, experts.intermediate
    word = {"RAWINT4": 8, "GPTQ_INT4": 8, "MXFP4": 2, "NVFP4": 2, "AMXINT4": 2}.get(format.method, 1)
    return (
        size % ranks == 0
        and blocks_stay_whole(size, ranks, format.block_rows)
        and blocks_stay_whole(size, ranks, format.group_columns(size))
        and (ranks == 1 or size // ranks % word == 0)
    )


def assert_holds(shards: list[Shard], experts: Experts) -> None:
    ranks = len(shards)
    for rank, shard in enumerate(shards):
        expected = expected_shard(experts, rank, ranks)
        for name in SHARD_FIELDS:
            actual, wanted = getattr(shard, name), getattr(expected, name)
            assert wanted is None or same_bits(actual, wanted), f"{name} of rank {rank} of {ranks}"


def assert_written(engine, layer, experts: Experts, ranks: int) -> None:
    shards = destinations(experts, ranks)
    submit_write(layer, shards)
    engine.sync(0)
    assert_holds(shards, experts)
    shards = destinations(experts, ranks)
    write_now(layer, shards)
    assert_holds(shards, experts)


def sizes(format: Format) -> tuple[int, int]:
    """(hidden, intermediate): hidden fills no panel and no block of FP8; a quarter of intermediate fits."""
    unit = math.lcm(format.column_step, 8, format.block_rows)
    return format.fit(200), 4 * unit * -(-64 // unit)


def make(format: Format, hidden: int, intermediate: int) -> Experts:
    """Random experts with every byte among the codes and scales: NaN, zeros of either sign, 2^-127."""
    experts = random_experts(1, 3, hidden, intermediate, format)
    for part in experts.parts:
        if format.codes == "e4m3":
            part.weight[SLOT].flat[5::7] = np.resize(
                np.arange(256, dtype=np.uint8), part.weight[SLOT].flat[5::7].shape
            )
        if format.scale_kind in ("ue8m0", "e4m3"):
            every_byte = np.arange(255 if format.scale_kind == "ue8m0" else 256, dtype=np.uint8)
            part.scale[SLOT].flat[:] = np.resize(every_byte, part.scale[SLOT].size)
    return experts


# ---- tests --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_every_rank_gets_the_bytes_of_the_checkpoint(format, ranks):
    experts = make(format, *sizes(format))
    assert can_split(experts, ranks)
    assert_written(ENGINE, build_layer(ENGINE, experts), experts, ranks)


@pytest.mark.parametrize(("threads", "subpools"), [(1, 1), (2, 2), (3, 3)])
@pytest.mark.parametrize("format", ONE_PER_METHOD, ids=str)
def test_weights_spread_over_pools_are_gathered(format, threads, subpools):
    experts = make(format, *sizes(format))
    engine = ext.Engine(threads, subpools)
    assert_written(engine, build_layer(engine, experts), experts, 2)


# intermediate, ranks: shares that cut panels, lie within a block, or cut blocks, groups and words.
SPLITS = [
    (32, 16),
    (64, 2),
    (96, 3),
    (160, 5),
    (96, 2),
    (96, 4),
    (96, 12),
    (256, 4),
    (384, 2),
    (320, 2),
    (480, 2),
    (66, 3),
]


@pytest.mark.parametrize(("intermediate", "ranks"), SPLITS)
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_a_split_is_written_exactly_or_refused(format, intermediate, ranks):
    experts = make(format, 40, intermediate)
    layer = build_layer(ENGINE, experts)
    if can_split(experts, ranks):
        assert_written(ENGINE, layer, experts, ranks)
        return
    shards = destinations(experts, 1) * ranks
    with pytest.raises(ValueError, match=format.method) as raised:
        submit_write(layer, shards)
    assert "\n" not in str(raised.value)
    assert ENGINE.pending == 0
    assert all((array.view(np.uint8) == FILL).all() for array in shards[0].arrays)


def test_refusals_and_successes_are_both_many():
    outcomes = [can_split(make(f, 40, i), ranks) for f in FORMATS for i, ranks in SPLITS]
    assert 0.2 < np.mean(outcomes) < 0.9


@pytest.mark.parametrize(
    "format", [f for f in FORMATS if f.method in ("BF16", "FP8", "FP8_PERCHANNEL")], ids=str
)
@pytest.mark.parametrize(("hidden", "intermediate"), [(33, 31), (300, 130), (1, 1), (129, 257)])
def test_odd_sizes_come_back_whole(format, hidden, intermediate):
    experts = make(format, hidden, intermediate)
    assert_written(ENGINE, build_layer(ENGINE, experts), experts, 1)


def test_rows_that_end_within_a_word():
    """RAWINT4 with a scale per row may have any even number of columns; what fills the word is free."""
    format = Format("RAWINT4", 0, BF16)
    experts = make(format, 34, 70)
    layer = build_layer(ENGINE, experts)
    (shard,) = destinations(experts, 1)
    submit_write(layer, [shard])
    ENGINE.sync(0)
    assert np.array_equal(unpack(format.method, shard.w2, 70), experts.down.codes(SLOT))
    w13 = unpack(format.method, shard.w13, 34)
    assert np.array_equal(w13, np.concatenate([experts.gate.codes(SLOT), experts.up.codes(SLOT)]))


def walk_destinations(side: str) -> None:
    engine = ext.Engine(2)
    for format in FORMATS:
        for hidden, intermediate in (sizes(format), (format.fit(33), format.fit(34))):
            experts = make(format, hidden, intermediate)
            layer = build_layer(engine, experts)
            for ranks in [ranks for ranks in RANKS if can_split(experts, ranks)]:
                print(f"{side=} {format} {hidden=} {intermediate=} {ranks=}", flush=True)
                guarded = [
                    [GuardedArray(array, side) for array in shard.arrays]
                    for shard in destinations(experts, ranks)
                ]
                shards = [as_shard([g.array for g in arrays]) for arrays in guarded]
                submit_write(layer, shards)
                engine.sync(0)
                assert all(g.canary_is_intact() for arrays in guarded for g in arrays)
                for arrays in guarded:
                    for g in arrays:
                        g.close()


@pytest.mark.parametrize("side", SIDES)
def test_nothing_beside_the_destinations_is_touched(side):
    isolated("test_write_expert", "walk_destinations", side, timeout=480)


def test_writes_forwards_and_loads_keep_their_order():
    """A forward, a write and a forward are queued; loading other weights waits for all three."""
    for format in ONE_PER_METHOD:
        engine = ext.Engine(2)
        experts, newer = (random_experts(seed, 3, 512, 512, format) for seed in (1, 2))
        call = random_call(1, experts, 200, top_k=2)
        layer = build_layer(engine, experts)
        expected = run(layer, call)
        outputs = [poisoned(call.hidden.shape, F32) for _ in range(2)]
        shards = destinations(experts, 2)
        layer.submit(*arguments(call, outputs[0], F32))
        submit_write(layer, shards)
        layer.submit(*arguments(call, outputs[1], F32))
        load(layer, newer)
        assert engine.pending == 0
        assert same_bits(outputs[0], expected)
        assert same_bits(outputs[1], expected)
        for rank, shard in enumerate(shards):
            for actual, wanted in zip(shard.arrays, expected_shard(experts, rank, 2).arrays, strict=True):
                assert same_bits(actual, wanted)


def test_a_layer_dropped_while_its_write_is_queued():
    engine = ext.Engine(2)
    experts = make(Format("FP8"), 64, 256)
    wide = random_experts(3, 2, 1024, 1024)
    call = random_call(3, wide, 128, top_k=2)
    output = poisoned(call.hidden.shape, F32)
    first, layer = build_layer(engine, wide), build_layer(engine, experts)
    shards = destinations(experts, 2)
    first.submit(*arguments(call, output, F32))  # keeps the queue busy meanwhile
    submit_write(layer, shards)
    del first, layer
    gc.collect()
    engine.sync(0)
    for rank, shard in enumerate(shards):
        for actual, wanted in zip(shard.arrays, expected_shard(experts, rank, 2).arrays, strict=True):
            assert same_bits(actual, wanted)


def test_writing_at_once_goes_past_the_queue_and_its_errors():
    engine = ext.Engine(2)
    experts = make(Format("FP8"), 64, 256)
    layer = build_layer(engine, experts)
    call = random_call(1, experts, 8, top_k=2)
    call.ids[0, 0] = 99
    output = poisoned(call.hidden.shape, F32)
    layer.submit(*arguments(call, output, F32))
    while engine.pending:
        pass
    shards = destinations(experts, 2)
    write_now(layer, shards)
    assert_holds(shards, experts)
    with pytest.raises(ValueError, match="id 99"):
        engine.sync(0)


@pytest.mark.parametrize("format", ONE_PER_METHOD, ids=str)
@pytest.mark.parametrize(("threads", "subpools"), [(1, 1), (3, 3)])
def test_writing_on_several_threads_while_calls_are_computed(format, threads, subpools):
    """A write takes the engine's threads if they are free, else its own: both must write every byte."""
    engine = ext.Engine(threads, subpools)
    experts = make(format, *sizes(format))
    layer = build_layer(engine, experts)
    call = random_call(2, experts, 16, top_k=2)
    expected = run(layer, call)
    failures = []

    def write_again_and_again() -> None:
        try:
            for _ in range(12):
                shards = destinations(experts, 2)
                write_now(layer, shards)
                assert_holds(shards, experts)
        except BaseException as failure:
            failures.append(failure)

    writers = [threading.Thread(target=write_again_and_again) for _ in range(2)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        output = poisoned(call.hidden.shape, F32)
        layer.submit(*arguments(call, output, F32))
        assert same_bits(run(layer, call), expected)
        assert same_bits(output, expected)
    for writer in writers:
        writer.join()
    assert not failures, failures[0]


# ---- arguments ----------------------------------------------------------------------------------

ARGUMENTS = ("w13_weight_ptrs", "w13_scale_ptrs", "w2_weight_ptrs", "w2_scale_ptrs")


@pytest.fixture(scope="module")
def experts():
    return make(Format("FP8"), 64, 256)


@pytest.fixture(scope="module")
def layer(experts):
    return build_layer(ENGINE, experts)


def write_arguments(shards: list[Shard], **changes) -> dict:
    lists = dict(zip(ARGUMENTS, pointers(shards), strict=True))
    return {"slot": SLOT, "ranks": len(shards)} | lists | changes


def assert_refused(layer, shards: list[Shard], message: str, **changes) -> None:
    queued = write_arguments(shards, **changes)
    at_once = {"expert" if name == "slot" else name: value for name, value in queued.items()}
    for write, values in ((layer.submit_write_expert, queued), (layer.write_expert, at_once)):
        with pytest.raises(ValueError, match=message) as raised:
            write(**values)
        assert "\n" not in str(raised.value)
    assert ENGINE.pending == 0
    assert all((array.view(np.uint8) == FILL).all() for shard in shards for array in shard.arrays)


@pytest.mark.parametrize("slot", [-1, 3, 1 << 30])
def test_slot_that_does_not_exist(layer, experts, slot):
    assert_refused(layer, destinations(experts, 2), rf"expert {slot} .*0 to 2", slot=slot)


@pytest.mark.parametrize("ranks", [0, -1])
def test_number_of_ranks_that_is_no_number(layer, experts, ranks):
    assert_refused(layer, destinations(experts, 2), rf"ranks is {ranks}\b", ranks=ranks)


@pytest.mark.parametrize("name", ARGUMENTS)
@pytest.mark.parametrize("length", [0, 1, 3])
def test_lists_have_an_address_for_each_rank(layer, experts, name, length):
    shards = destinations(experts, 2)
    addresses = (write_arguments(shards)[name] * 2)[:length]
    assert_refused(layer, shards, rf"\b{length}\b.*\b2\b|\b2\b.*\b{length}\b", **{name: addresses})


@pytest.mark.parametrize("name", ARGUMENTS)
def test_null_destinations(layer, experts, name):
    shards = destinations(experts, 2)
    addresses = [write_arguments(shards)[name][0], 0]
    assert_refused(layer, shards, "null pointer", **{name: addresses})


def test_write_before_load(experts):
    layer = make_layer(ENGINE, experts, layer_idx=17)
    with pytest.raises(RuntimeError, match="layer 17 has no weights"):
        submit_write(layer, destinations(experts, 1))
    with pytest.raises(RuntimeError, match="layer 17 has no weights"):
        write_now(layer, destinations(experts, 1))
