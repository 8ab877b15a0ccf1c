"""Which way a prompt's tokens go is settled once, however the scheduler cuts it up later."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from kt_kernel.integrations.sglang.prompt_rows import rows_of

THRESHOLD, CHUNK = 10, 16


def request(prompt: int) -> SimpleNamespace:
    return SimpleNamespace(origin_input_ids=[7] * prompt)


def streamed(*parts: tuple[SimpleNamespace, int, int], mode=ForwardMode.EXTEND) -> list[int]:
    """`parts`: requests with the tokens before this batch and in it."""
    requests, before, new = zip(*parts, strict=True)
    batch = SimpleNamespace(forward_mode=mode, reqs=requests, prefix_lens=before, extend_lens=new)
    rows = rows_of(batch, THRESHOLD, CHUNK)
    assert [part.rows for part in rows] == list(new)
    return [part.streamed for part in rows]


@pytest.mark.parametrize("cuts", [[25], [16, 9], [7, 16, 2], [1] * 25, [20, 5]], ids=str)
@pytest.mark.parametrize("cached", [0, 40])
def test_other_chunks_change_nothing(cuts, cached):
    """25 new tokens: a whole chunk is streamed, the 9 behind it are not."""
    one, place, ways = request(cached + 25), cached, []
    for new in cuts:
        (count,) = streamed((one, place, new))
        ways += [True] * count + [False] * (new - count)
        place += new
    assert ways == [True] * 16 + [False] * 9


def test_tokens_that_are_decoded_beside_prompts_are_never_streamed():
    long, short = request(16), request(4)
    assert streamed((long, 0, 16), (short, 0, 4)) == [16, 0]
    decoded = [(long, 16, 1), (short, 4, 1)]
    assert streamed(*decoded, (request(12), 0, 12), mode=ForwardMode.MIXED) == [0, 0, 12]
    for mode in (ForwardMode.DECODE, ForwardMode.TARGET_VERIFY, ForwardMode.IDLE):
        batch = SimpleNamespace(forward_mode=mode, reqs=[long] * 64)
        assert rows_of(batch, THRESHOLD, CHUNK) == []


def test_a_request_that_gave_its_memory_up_goes_the_same_way_again():
    """Its answer so far is computed with the prompt then, but as it was decoded, and makes it no longer."""
    one = request(12)
    assert streamed((one, 0, 12)) == [12]
    one.output_ids = [5] * 30
    assert streamed((one, 0, 42)) == [12]
    assert streamed((one, 8, 34)) == [4]
    cached = request(40)
    assert streamed((cached, 35, 5)) == [0]
    assert streamed((cached, 0, 16)) == [16], "its beginning is no more in the cache"
