"""Risk: a device decodes other numbers than the CPU computes with, or a rank gets another's part of them."""

from __future__ import annotations

import pytest
import torch
from api_support import random_experts
from format_support import (
    GPTQ_CONFIG,
    METHODS,
    checkpoint_tensors,
    decoded,
    load,
    make_layer,
    quantised,
    save,
)
from hybrid_models import assert_close

from kt_kernel.decoding import decode_expert
from kt_kernel.errors import CallOrderError, ConfigurationError, InputError
from kt_kernel.expert_image import ExpertEncoding, ExpertTensors
from kt_kernel.hybrid.device import backend_of
from kt_kernel.hybrid.feed import Channel, ExpertFeed
from kt_kernel.hybrid.ranks import ALONE
from kt_kernel.hybrid.torch_experts import TorchDeviceExperts

# Four ranks still get a whole block of 128 columns; hidden is ragged.
EXPERTS, HIDDEN, INTERMEDIATE = 3, 160, 512
PHYSICAL = [2, 0, 1]  # the checkpoint's expert in each slot of the wrapper


def _wrapper(method: str, intermediate: int = INTERMEDIATE, **changes):
    layer = make_layer(
        method, num_experts=EXPERTS, hidden_size=HIDDEN, moe_intermediate_size=intermediate, **changes
    )
    experts = random_experts(4, EXPERTS, HIDDEN, intermediate)
    layer.load_weights_from_tensors(*experts, torch.tensor(PHYSICAL))
    return layer


def _written(wrapper, expert: int, ranks: int) -> list[ExpertTensors]:
    encoding = wrapper.encoding(ranks)
    shards = [encoding.views(torch.zeros(encoding.bytes, dtype=torch.uint8)) for _ in range(ranks)]
    wrapper.write_expert(expert, shards)
    return shards


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("method", METHODS)
def test_every_rank_decodes_its_part_of_the_checkpoint_exactly(method, ranks):
    wrapper = _wrapper(method)
    gate, up, down = decoded(method, quantised(method, 4, EXPERTS, HIDDEN, INTERMEDIATE))
    share = INTERMEDIATE // ranks
    for expert, of_checkpoint in enumerate(PHYSICAL):
        for rank, shard in enumerate(_written(wrapper, expert, ranks)):
            mine = slice(rank * share, (rank + 1) * share)
            w13, w2 = decode_expert(shard, wrapper.encoding(ranks), torch.float32)
            expected = torch.cat([gate[of_checkpoint, mine], up[of_checkpoint, mine]])
            assert torch.equal(w13, expected.float())
            assert torch.equal(w2, down[of_checkpoint, :, mine].float())


@pytest.mark.parametrize("method", ["RAWINT4", "GPTQ_INT4"])
@pytest.mark.parametrize("scales", [torch.float16, torch.bfloat16, torch.float32])
def test_the_encoding_follows_the_scales_of_the_checkpoint(method, scales, tmp_path):
    checkpoint = quantised(method, 4, EXPERTS, HIDDEN, INTERMEDIATE)
    tensors = {
        name: tensor.to(scales) if name.endswith(("weight_scale", "scales")) else tensor
        for name, tensor in checkpoint_tensors(method, checkpoint).items()
    }
    config = {"quantization_config": {**GPTQ_CONFIG, "group_size": 32}}
    path = save(tmp_path / "model", method, tensors, config)
    sizes = {"num_experts": EXPERTS, "hidden_size": HIDDEN, "moe_intermediate_size": INTERMEDIATE}
    wrapper = load(method, path, **sizes)
    encoding = wrapper.encoding(2)
    assert encoding.w13_scale.dtype is scales and encoding.group_size == 32
    w13, _ = decode_expert(_written(wrapper, 1, 2)[0], encoding, torch.float32)
    gate = decoded(method, checkpoint)[0][1, : INTERMEDIATE // 2]
    assert_close(w13[: INTERMEDIATE // 2], gate)


@pytest.mark.parametrize("method", METHODS)
def test_all_bytes_of_the_image_are_written_and_none_beside_it(method):
    wrapper = _wrapper(method)
    encoding = wrapper.encoding(2)
    for filling in (0x00, 0xA5):
        buffers = [torch.full((encoding.bytes + 64,), filling, dtype=torch.uint8) for _ in range(2)]
        wrapper.write_expert(1, [encoding.views(buffer) for buffer in buffers])
        for buffer in buffers:
            assert (buffer[encoding.bytes :] == filling).all()
    twice = [_written(wrapper, 1, 2)[1], encoding.views(buffers[1])]
    for once, again in zip(*twice, strict=True):
        assert once is None or torch.equal(once.view(torch.uint8), again.view(torch.uint8))


@pytest.mark.parametrize(
    ("method", "intermediate", "ranks", "reason"),
    [
        ("BF16", 512, 3, "equal size"),
        ("RAWINT4", 384, 8, "scale groups of 32"),
        ("RAWINT4", 384, 96, "words of 8"),
        ("FP8", 384, 2, "scale groups of 128"),
        ("MXFP4", 96, 2, "scale groups of 32"),
    ],
)
def test_a_cut_that_the_layout_cannot_express_is_refused_where_the_extension_refuses_it(
    method, intermediate, ranks, reason
):
    wrapper = _wrapper(method, intermediate)
    with pytest.raises(ConfigurationError, match=f"{method}.*{intermediate}.*{ranks} devices.*{reason}"):
        wrapper.encoding(ranks)
    with pytest.raises(InputError):
        wrapper.submit_write_weight_scale_to_buffer(ranks, 0, *[[1] * ranks] * 4)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 12])
@pytest.mark.parametrize("method", METHODS)
def test_the_encoding_and_the_extension_agree_on_what_can_be_cut(method, ranks):
    wrapper = _wrapper(method, 384)
    try:
        shards = _written(wrapper, 0, ranks)
    except ConfigurationError:
        with pytest.raises(InputError):
            wrapper.submit_write_weight_scale_to_buffer(ranks, 0, *[[1] * ranks] * 4)
        return
    parts = [decode_expert(shard, wrapper.encoding(ranks), torch.float32)[1] for shard in shards]
    expected = decoded(method, quantised(method, 4, EXPERTS, HIDDEN, 384))[2][PHYSICAL[0]]
    assert torch.equal(torch.cat(parts, dim=1), expected.float())


def test_methods_without_an_image_are_refused():
    with pytest.raises(ConfigurationError, match="AMXINT8 cannot be copied to a device; use one of BF16"):
        ExpertEncoding("AMXINT8", 1, 64, 64)


def test_an_expert_that_does_not_exist():
    wrapper = _wrapper("BF16")
    with pytest.raises(InputError, match="layer 0: expert 3 "):
        _written(wrapper, EXPERTS, 1)


def test_nothing_can_be_written_before_the_weights_are_loaded():
    layer = make_layer("FP8")
    for call in (lambda: layer.encoding(1), lambda: layer.write_expert(0, [])):
        with pytest.raises(CallOrderError, match="the weights are not loaded"):
            call()


# ---- through the channel -------------------------------------------------------------------------


def _feed(wrapper) -> ExpertFeed:
    encoding = wrapper.encoding(1)
    return ExpertFeed(wrapper, encoding, Channel(encoding, ALONE, backend_of(torch.device("cpu"))))


def test_the_expert_before_stays_readable_while_the_next_is_written():
    """The copy of one may still be on its way when the next is asked for."""
    wrapper = _wrapper("NVFP4")
    before = None
    for expert, tensors in _feed(wrapper).experts([0, 2, 1, 2, 0]):
        for written, number in ((tensors, expert), before or (tensors, expert)):
            expected = _written(wrapper, number, 1)[0]
            for part, expected_part in zip(written, expected, strict=True):
                assert part is None or torch.equal(part, expected_part)
        before = (tensors, expert)


class _FailsOnce(TorchDeviceExperts):
    failed = False

    def store(self, slot, tensors):
        if slot == 1 and not self.failed:
            self.failed = True
            raise MemoryError("full")
        return super().store(slot, tensors)


def test_an_expert_that_cannot_be_stored_does_not_stop_the_others_from_passing():
    """Other ranks count on this one to take every expert."""
    wrapper = _wrapper("FP8")
    feed = _feed(wrapper)
    passed = []
    pass_on = feed._channel.pass_on
    feed._channel.pass_on = lambda source, expert: passed.append(expert) or pass_on(source, expert)
    room = _FailsOnce(3, HIDDEN, INTERMEDIATE, torch.float32, "cpu", wrapper.encoding(1))
    with pytest.raises(MemoryError):
        feed.fill(room, {0: 0, 1: 1, 2: 2})
    assert passed == [0, 1, 2]
    assert feed.fill(room, {0: 2, 2: 1}) == 2 * wrapper.encoding(1).bytes
    expected = [decode_expert(_written(wrapper, e, 1)[0], wrapper.encoding(1), torch.float32) for e in (2, 0)]
    assert torch.equal(room.w13[1:], torch.stack([w13 for w13, _ in expected]))
    assert torch.equal(room.w2[1:], torch.stack([w2 for _, w2 in expected]))


def test_layers_that_are_stored_differently_do_not_share_a_channel():
    first, other = _wrapper("FP8"), _wrapper("BF16")
    channel = Channel(first.encoding(1), ALONE, backend_of(torch.device("cpu")))
    with pytest.raises(CallOrderError, match="one channel per encoding"):
        ExpertFeed(other, other.encoding(1), channel)
