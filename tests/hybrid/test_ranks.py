"""Two processes share a model: both must hold the right halves, switch together and give up together.

The processes are started once per test, and each runs all of a test's cases.
"""

from __future__ import annotations

import logging
import os
import queue
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from hybrid_models import (
    DECODER_LAYERS,
    EXPERTS,
    HIDDEN,
    MOE_LAYERS,
    NONE_DEFERRED,
    PROMPT,
    TOP_K,
    Engine,
    Reference,
    assert_close,
    expert_weights,
    prompt,
    wrappers,
)
from torch import distributed, multiprocessing

from kt_kernel import KTMoEWrapper, kt_kernel_ext
from kt_kernel.errors import KTError
from kt_kernel.hybrid import fetch
from kt_kernel.hybrid.device import CpuBackend
from kt_kernel.hybrid.feed import Channel, ExpertFeed
from kt_kernel.hybrid.options import HybridOptions
from kt_kernel.hybrid.ranks import ALONE, Ranks, TorchRanks
from kt_kernel.hybrid.torch_experts import TorchDeviceExperts

SIZE = 2
_SECONDS = 480
_SECONDS_TO_NOTICE = 60  # far more than it takes on an idle machine


def _enter(rank: int, work: Callable[[Ranks], None], store: str, failures: multiprocessing.Queue) -> None:
    """A process's whole life."""
    try:
        torch.set_num_threads(1)
        distributed.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=SIZE,
            timeout=timedelta(seconds=_SECONDS),
        )
        work(TorchRanks(distributed.group.WORLD))
        distributed.barrier()
        # Else gloo's threads let go of the last tensors whenever they come to it, and one that asks for
        # Python's lock while the interpreter ends is made to exit in the middle of a destructor:
        # std::terminate.
        distributed.destroy_process_group()
    except BaseException:
        failures.put(f"rank {rank}:\n{traceback.format_exc()}")
        raise


def _run_in_two_processes(work: Callable[[Ranks], None], tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    failures = context.Queue()
    processes = [
        context.Process(target=_enter, args=(rank, work, str(tmp_path / "store"), failures))
        for rank in range(SIZE)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(_SECONDS)
    alive = [process for process in processes if process.is_alive()]
    for process in alive:
        process.kill()
    assert not alive, "the processes wait for each other"
    if any(process.exitcode for process in processes):
        codes = [process.exitcode for process in processes]
        pytest.fail(f"the processes ended with {codes}; {_told(failures)}")


def _told(failures: multiprocessing.Queue) -> str:
    """What a process said before it ended; one that was killed or aborted says nothing."""
    try:
        return failures.get(timeout=5)
    except queue.Empty:
        return "neither raised an exception; the output above may say why"


# ---- what ranks can do ---------------------------------------------------------------------------


def _collective_calls(ranks: Ranks) -> None:
    assert ranks.size == SIZE
    assert ranks.minimum(5 - ranks.rank) == 4
    assert ranks.broadcast({"rank": ranks.rank, "tensor": torch.tensor([1.5])}) == {
        "rank": 0,
        "tensor": torch.tensor([1.5]),
    }
    assert ranks.gather(7 * ranks.rank) == [0, 7]
    assert ranks.first("mine" if ranks.rank else None) == "mine"
    assert ranks.first(None) is None
    memory = ranks.shared_memory(1 << 20)
    assert memory.dtype is torch.uint8 and memory.shape == (1 << 20,) and not memory.any()
    ranks.barrier()
    memory[ranks.rank] = ranks.rank + 1
    ranks.barrier()
    assert memory[:3].tolist() == [1, 2, 0]
    other = ranks.shared_memory(4096)
    assert not other.any() and other.data_ptr() != memory.data_ptr()


def test_collective_calls(tmp_path):
    _run_in_two_processes(_collective_calls, tmp_path)


def test_alone():
    assert (ALONE.rank, ALONE.size, ALONE.minimum(3)) == (0, 1, 3)
    assert ALONE.broadcast("value") == "value"
    assert ALONE.shared_memory(8).tolist() == [0] * 8


# ---- a model -------------------------------------------------------------------------------------


def _masks() -> torch.Tensor:
    masks = torch.zeros(DECODER_LAYERS, EXPERTS, dtype=torch.bool)
    masks[:, [1, 6]] = True
    masks[3] = False  # a layer without slots
    masks[4] = True  # and one with all
    return masks


def _check_passes(engine: Engine, ranks: Ranks, reference: Reference, lengths: list[int]) -> None:
    decoder, expected_decoder = engine.decoder(distributed.all_reduce), reference.decoder()
    for seed, length in enumerate(lengths):
        engine.model.begin_step()
        reference.on_device = engine.placements()
        assert reference.on_device == ranks.broadcast(reference.on_device), "the ranks hold other experts"
        logits, expected = (
            decoder.forward(prompt(seed, length)),
            expected_decoder.forward(prompt(seed, length)),
        )
        assert_close(logits, expected, f"pass {seed}")
        if ranks.rank == 0:
            assert engine.cpu_runs == reference.cpu_runs, f"pass {seed}"


CASES = [
    (options, max_deferred, method)
    for method in ("BF16", "GPTQ_INT4", "NVFP4")
    for max_deferred in (0, 2)
    for options in (
        HybridOptions(),
        HybridOptions(prefill_threshold=PROMPT),
        HybridOptions(prefill_threshold=PROMPT, update_after_prefill=True, update_interval=2),
    )
    if method == "BF16" or (options.update_interval and not max_deferred)
]


def _passes_of_every_kind(ranks: Ranks, readers: Ranks | None = None) -> None:
    for options, max_deferred, method in CASES:
        with Engine(_masks(), options, max_deferred, method, ranks=ranks, readers=readers) as engine:
            reference = Reference(max_deferred, options.prefill_threshold, method)
            _check_passes(engine, ranks, reference, [PROMPT, 1, 1, PROMPT - 1, 1, PROMPT + 2, 1])
            assert engine.model.report()["prefill"]["fallbacks"] == 0


def test_two_ranks_give_the_sums_of_one(tmp_path):
    _run_in_two_processes(_passes_of_every_kind, tmp_path)


def _passes_with_shares(ranks: Ranks) -> None:
    _passes_of_every_kind(ranks, ALONE)


def test_two_ranks_with_half_of_each_cpu_expert_give_the_sums_of_one(tmp_path):
    _run_in_two_processes(_passes_with_shares, tmp_path)


class _ShortOnOneRank(TorchDeviceExperts):
    """Rank 1 runs out of memory: for the room, for a copy, or in a computation."""

    rank = 0
    what: ClassVar[str | None] = None

    def _use(self, what: str) -> None:
        if self.capacity == EXPERTS and type(self).rank == 1 and type(self).what == what:
            type(self).what = None
            raise torch.OutOfMemoryError(what)

    def __init__(self, capacity, *rest):
        super().__init__(capacity, *rest)
        self._use("room")

    def store(self, slot, tensors):
        self._use("store")
        return super().store(slot, tensors)

    def compute(self, hidden, slots, weights):
        self._use("compute")
        return super().compute(hidden, slots, weights)


def _one_rank_is_short(ranks: Ranks) -> None:
    logging.getLogger("kt_kernel").setLevel(logging.ERROR)
    _ShortOnOneRank.rank = ranks.rank
    masks = _masks()
    masks[4] = False
    options = HybridOptions(prefill_threshold=PROMPT)
    with Engine(masks, options, 2, device_experts=_ShortOnOneRank, ranks=ranks) as engine:
        for fallbacks, what in enumerate(("room", "store", "compute"), start=1):
            _ShortOnOneRank.what = what
            reference = Reference(2, PROMPT)
            reference.prefilled = ()
            engine.cpu_runs.clear()
            _check_passes(engine, ranks, reference, [PROMPT])
            assert engine.model.prefill.fallbacks == fallbacks
        engine.cpu_runs.clear()
        _check_passes(engine, ranks, Reference(2, PROMPT), [PROMPT, 1])
        assert engine.model.prefill.fallbacks == 3


def test_memory_that_is_short_on_one_rank_is_short_on_all(tmp_path):
    _run_in_two_processes(_one_rank_is_short, tmp_path)


def _experts_are_fetched(ranks: Ranks, readers: Ranks | None = None) -> None:
    """Whatever the speeds of this machine say, two of a call's cold experts are fetched."""
    fetch.split_misses = lambda tokens_of, *_: tuple(sorted(tokens_of)[:2])
    with Engine(_masks(), HybridOptions(miss_policy="auto"), ranks=ranks, readers=readers) as engine:
        engine.model.begin_step()
        engine.cpu_runs.clear()  # those of the measurement
        reference = Reference()
        decoder, expected_decoder = engine.decoder(distributed.all_reduce), reference.decoder()
        reference.on_device = engine.placements()
        for seed, length in enumerate([PROMPT, 1, 1, 7]):
            expected = expected_decoder.forward(prompt(seed, length))
            assert_close(decoder.forward(prompt(seed, length)), expected, f"pass {seed}")
        assert engine.model.misses.experts_fetched > 0
        assert engine.model.report()["bytes"]["misses"] > 0
        assert engine.cpu_runs != reference.cpu_runs or ranks.rank == 1


def test_fetched_experts_are_shared_out_over_the_ranks(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    _run_in_two_processes(_experts_are_fetched, tmp_path)


def _own_experts_are_fetched(ranks: Ranks) -> None:
    _experts_are_fetched(ranks, ALONE)


def test_each_rank_fetches_from_its_own_half(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    _run_in_two_processes(_own_experts_are_fetched, tmp_path)


def _calls_fail_on_one_rank(ranks: Ranks) -> None:
    """Each failure ends its call on the rank where it happens, or on both, and the next call is right."""
    fetch.split_misses = lambda tokens_of, *_: tuple(sorted(tokens_of)[:2])
    options = HybridOptions(miss_policy="auto", prefill_threshold=PROMPT)
    masks = torch.zeros(DECODER_LAYERS, EXPERTS, dtype=torch.bool)
    masks[:, 1] = True
    with Engine(masks, options, ranks=ranks) as engine:
        engine.model.begin_step()
        layer = engine.layers[MOE_LAYERS[0]]
        hidden, ids = torch.randn(PROMPT, HIDDEN), torch.tensor([[0, 1, 2]]).repeat(PROMPT, 1)
        hidden = ranks.broadcast(hidden)
        weights = torch.rand(PROMPT, TOP_K, generator=torch.Generator().manual_seed(1))

        def check_call(rows: int) -> None:
            call = hidden[:rows], ids[:rows], weights[:rows]
            output = layer.forward(*call)
            distributed.all_reduce(output)
            expected = Reference()._sum(layer.layer_idx, call[0].double(), call[1].tolist(), call[2].double())
            assert_close(output, expected)

        for rows in (3, PROMPT):  # a fetch, and a layerwise prefill
            for broken, name, raised_on in (
                (layer.wrapper, "submit_split", (0,)),
                (layer.wrapper, "moe", (0, 1)),
                (layer.resident if ranks.rank else None, "compute", (1,)),
            ):
                if rows == PROMPT and name != "moe":
                    continue  # not called in a prefill
                engine.model.prefill._release()
                fails = (
                    pytest.raises((ValueError, RuntimeError)) if ranks.rank in raised_on else nullcontext()
                )
                with pytest.MonkeyPatch.context() as patch, fails:
                    if broken is not None:
                        patch.setattr(broken, name, _without_weights(broken) if name == "moe" else _fail)
                    layer.forward(hidden[:rows], ids[:rows], weights[:rows])
                check_call(rows)


def _without_weights(wrapper: KTMoEWrapper) -> kt_kernel_ext.MoeLayer:
    """No expert of it can be written."""
    return kt_kernel_ext.MoeLayer(
        wrapper.cpu_infer,
        method=wrapper.method,
        num_experts=EXPERTS,
        top_k=TOP_K,
        hidden=HIDDEN,
        intermediate=wrapper.moe_intermediate_size,
        max_tokens=1,
    )


def _fetching_runs_out_of_memory_on_one_rank(ranks: Ranks) -> None:
    fetch.split_misses = lambda tokens_of, *_: tuple(sorted(tokens_of)[:2])
    with Engine(_masks(), HybridOptions(miss_policy="auto"), ranks=ranks) as engine:
        engine.model.begin_step()
        room = engine.model.misses._target
        if ranks.rank:
            room.store = _run_out_of_memory
        with pytest.raises(KTError, match="ran out of memory while it fetched"):
            engine.decoder(distributed.all_reduce).forward(prompt(1))
        fetched = engine.model.misses.experts_fetched
        engine.cpu_runs.clear()
        _check_passes(engine, ranks, Reference(), [PROMPT, 1])
        assert engine.model.misses.experts_fetched == fetched


def _run_out_of_memory(*_: object) -> None:
    raise torch.OutOfMemoryError("made to fail")


def test_fetching_ends_on_all_ranks_when_memory_runs_out_on_one(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    _run_in_two_processes(_fetching_runs_out_of_memory_on_one_rank, tmp_path)


def _fail(*_: object, **__: object) -> None:
    raise ValueError("made to fail")


def test_a_call_that_fails_on_one_rank_leaves_the_ranks_in_step(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    _run_in_two_processes(_calls_fail_on_one_rank, tmp_path)


def _an_update_runs(ranks: Ranks, readers: Ranks | None = None) -> None:
    with Engine(_masks(), HybridOptions(update_interval=1), ranks=ranks, readers=readers) as engine:
        reference = Reference()
        for _ in range(30):
            engine.cpu_runs.clear()
            reference.cpu_runs.clear()
            _check_passes(engine, ranks, reference, [5])
            reference = Reference()
        assert engine.model.report()["experts_moved"] > 0


def test_ranks_admit_moved_experts_at_the_same_step(tmp_path):
    _run_in_two_processes(_an_update_runs, tmp_path)


def _the_other_rank_ends(ranks: Ranks, ending: int) -> None:
    """While the channel is in use: an error within seconds on the rank that is left."""
    wrapper = wrappers(NONE_DEFERRED)[MOE_LAYERS[0]] if ranks.rank == 0 else None
    encoding = ranks.broadcast(None if wrapper is None else wrapper.encoding(SIZE))
    feed = ExpertFeed(wrapper, encoding, Channel(encoding, ranks, CpuBackend(torch.device("cpu"))))
    feed.pass_by(range(EXPERTS))
    ranks.barrier()
    if ranks.rank != ending:
        begin = time.monotonic()
        with pytest.raises(KTError, match=r"process \d+, another rank of this model, ended"):
            feed.pass_by(range(EXPERTS))
        assert time.monotonic() - begin < _SECONDS_TO_NOTICE
    os._exit(0)


def _rank_0_ends(ranks: Ranks) -> None:
    _the_other_rank_ends(ranks, 0)


def _rank_1_ends(ranks: Ranks) -> None:
    _the_other_rank_ends(ranks, 1)


@pytest.mark.parametrize("work", [_rank_0_ends, _rank_1_ends])
def test_a_rank_that_ends_during_a_copy_is_noticed(work, tmp_path):
    _run_in_two_processes(work, tmp_path)


def _an_expert_cannot_be_written(ranks: Ranks) -> None:
    """In the middle of a list: both ranks stop there, and the next list is right."""
    wrapper = wrappers(NONE_DEFERRED)[MOE_LAYERS[0]] if ranks.rank == 0 else None
    encoding = ranks.broadcast(None if wrapper is None else wrapper.encoding(SIZE))
    channel = Channel(encoding, ranks, CpuBackend(torch.device("cpu")))
    feed = ExpertFeed(wrapper, encoding, channel)
    for dtype in (torch.bfloat16, torch.float32):  # copied as they are; decoded on their way
        before = channel.pipeline.passed
        room = TorchDeviceExperts(EXPERTS, HIDDEN, encoding.share, dtype, "cpu", encoding)
        with pytest.raises(KTError, match="could not write" if ranks.rank else "expert 99 does not exist"):
            feed.fill(room, {0: 0, 99: 1, 2: 2})
        assert channel.pipeline.passed == before + 2
        feed.fill(room, {expert: expert for expert in range(EXPERTS)})
        gate, up, down = expert_weights(MOE_LAYERS[0])
        mine = slice(ranks.rank * encoding.share, (ranks.rank + 1) * encoding.share)
        assert torch.equal(room.w13, torch.cat([gate[:, mine], up[:, mine]], dim=1).to(dtype))
        assert torch.equal(room.w2, down[:, :, mine].to(dtype))


def test_an_expert_that_cannot_be_written_leaves_the_ranks_in_step(tmp_path):
    _run_in_two_processes(_an_expert_cannot_be_written, tmp_path)


@pytest.fixture(autouse=True)
def _no_leftovers():
    yield
    assert not multiprocessing.active_children()
