"""Risk: a device decodes other numbers than the CPU computes with, or a rank gets another's part of them."""

from __future__ import annotations

import ctypes

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
    written,
)
from hybrid_models import assert_close

from kt_kernel import kt_kernel_ext
from kt_kernel.errors import CallOrderError, ConfigurationError, InputError
from kt_kernel.formats.decoding import decode_expert
from kt_kernel.formats.expert_image import ExpertEncoding, ExpertTensors
from kt_kernel.hybrid.device import backend_of
from kt_kernel.hybrid.feed import BUFFERS, Channel, ExpertFeed
from kt_kernel.hybrid.ranks import ALONE
from kt_kernel.hybrid.torch_experts import TorchDeviceExperts

# Four ranks still get a whole block of 128 columns; hidden is ragged.
EXPERTS, HIDDEN, INTERMEDIATE = 3, 160, 512
PHYSICAL = [2, 0, 1]  # the checkpoint's expert in each slot of the wrapper


def _wrapper(method: str, intermediate: int = INTERMEDIATE, **changes):
    if method == "LLAMAFILE":  # in panels, as all others; with bf16 activations it is kept as the file has it
        changes = {"activations": "auto", **changes}
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
@pytest.mark.parametrize("method", [*METHODS, "LLAMAFILE"])
def test_every_rank_decodes_its_part_of_the_checkpoint_exactly(method, ranks):
    wrapper = _wrapper(method)
    numbers = decoded(method, quantised(method, 4, EXPERTS, HIDDEN, INTERMEDIATE))
    gate, up, down = (written(method, matrices) for matrices in numbers)
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


@pytest.mark.parametrize("method", [*METHODS, "LLAMAFILE"])
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
@pytest.mark.parametrize("method", [*METHODS, "LLAMAFILE"])
def test_the_encoding_and_the_extension_agree_on_what_can_be_cut(method, ranks):
    wrapper = _wrapper(method, 384)
    try:
        shards = _written(wrapper, 0, ranks)
    except ConfigurationError:
        with pytest.raises(InputError):
            wrapper.submit_write_weight_scale_to_buffer(ranks, 0, *[[1] * ranks] * 4)
        return
    parts = [decode_expert(shard, wrapper.encoding(ranks), torch.float32)[1] for shard in shards]
    expected = written(method, decoded(method, quantised(method, 4, EXPERTS, HIDDEN, 384))[2][PHYSICAL[0]])
    assert torch.equal(torch.cat(parts, dim=1), expected.float())


def test_methods_without_an_image_are_refused():
    with pytest.raises(ConfigurationError, match="INT3 cannot be copied to a device; use one of BF16"):
        ExpertEncoding("INT3", 1, 64, 64)


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


class _Copied(kt_kernel_ext.DeviceCopies):
    """A device that is slow: each expert's copy is done when the pipeline waits for it, and not before."""

    def __init__(self):
        super().__init__()
        self.waiting = {}

    def copy(self, to, source, size):
        self.pending = (to, source, size)

    def mark_copied(self, buffer):
        self.waiting[buffer] = self.pending

    def copied(self, buffer):
        return buffer not in self.waiting

    def wait_until_copied(self, buffer):
        ctypes.memmove(*self.waiting.pop(buffer))

    def wait_until_used(self, buffer):
        pass


def test_a_host_buffer_is_not_written_again_before_it_is_copied():
    wrapper = _wrapper("BF16")
    encoding, copies = wrapper.encoding(1), _Copied()
    experts = [expert % EXPERTS for expert in range(3 * BUFFERS)]
    arrived = torch.zeros(len(experts), encoding.bytes, dtype=torch.uint8)
    backend = backend_of(torch.device("cpu"))
    backend.copies = lambda buffers: copies
    channel = Channel(encoding, ALONE, backend)
    for expert, place in zip(experts, arrived, strict=True):
        # One part alone, so that each expert is one copy.
        channel.copy(wrapper, [expert], torch.tensor([[place.data_ptr(), 0, 0, 0, 0]]))
    assert len(copies.waiting) == BUFFERS, "as many as can be on their way are"
    for buffer in list(copies.waiting):
        copies.wait_until_copied(buffer)
    for expert, place in zip(experts, arrived, strict=True):
        expected = _written(wrapper, expert, 1)[0].w13_weight
        assert torch.equal(encoding.views(place).w13_weight, expected)


@pytest.mark.parametrize("method", ["BF16", "FP8"])
def test_experts_go_straight_to_slots_that_take_them_as_they_are(method):
    wrapper = _wrapper(method)
    encoding = wrapper.encoding(1)

    class Slots:
        capacity = 2

        def __init__(self):
            memory = torch.zeros(self.capacity, encoding.bytes, dtype=torch.uint8)
            self.images = [encoding.views(image) for image in memory]

        def places(self, slot):
            return self.images[slot]

    slots = Slots()
    feed = _feed(wrapper)
    for experts in ([2, 0], [1, 2]):
        stored = sum(part.nbytes for part in slots.images[0] if part is not None)
        assert feed.fill(slots, {expert: slot for slot, expert in enumerate(experts)}) == 2 * stored
        for expert, image in zip(experts, slots.images, strict=True):
            for part, expected in zip(image, _written(wrapper, expert, 1)[0], strict=True):
                assert part is expected is None or torch.equal(part, expected)
        slots.images = slots.images[::-1]  # the tensors were replaced: their addresses must not be remembered


def test_a_slot_of_another_size_is_refused_and_the_experts_pass():
    wrapper = _wrapper("BF16")
    feed = _feed(wrapper)
    room = TorchDeviceExperts(1, HIDDEN, INTERMEDIATE + 32, torch.bfloat16, "cpu", wrapper.encoding(1))
    with pytest.raises(ConfigurationError, match=r"bytes .* for a part of BF16 experts"):
        feed.fill(room, {0: 0})
    assert feed._channel.pipeline.passed == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])  # copied as they are; decoded on their way
def test_an_expert_that_does_not_exist_ends_a_run_and_not_the_channel(dtype):
    wrapper = _wrapper("BF16")
    feed = _feed(wrapper)
    room = TorchDeviceExperts(3, HIDDEN, INTERMEDIATE, dtype, "cpu", wrapper.encoding(1))
    with pytest.raises(InputError, match=f"expert {EXPERTS} does not exist"):
        feed.fill(room, {0: 0, EXPERTS: 1, 1: 2})
    assert feed._channel.pipeline.passed == 2
    feed.fill(room, {1: 2})
    w13, _ = decode_expert(_written(wrapper, 1, 1)[0], wrapper.encoding(1), dtype)
    assert torch.equal(room.w13[2], w13)


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
    room = _FailsOnce(3, HIDDEN, INTERMEDIATE, torch.float32, "cpu", wrapper.encoding(1))
    with pytest.raises(MemoryError):
        feed.fill(room, {0: 0, 1: 1, 2: 2})
    assert feed._channel.pipeline.passed == 3
    assert feed.fill(room, {0: 2, 2: 1}) == 2 * wrapper.encoding(1).bytes
    expected = [decode_expert(_written(wrapper, e, 1)[0], wrapper.encoding(1), torch.float32) for e in (2, 0)]
    assert torch.equal(room.w13[1:], torch.stack([w13 for w13, _ in expected]))
    assert torch.equal(room.w2[1:], torch.stack([w2 for _, w2 in expected]))


def test_layers_that_are_stored_differently_do_not_share_a_channel():
    first, other = _wrapper("FP8"), _wrapper("BF16")
    channel = Channel(first.encoding(1), ALONE, backend_of(torch.device("cpu")))
    with pytest.raises(CallOrderError, match="one channel per encoding"):
        ExpertFeed(other, other.encoding(1), channel)
