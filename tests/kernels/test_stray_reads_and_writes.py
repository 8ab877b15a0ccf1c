"""Risk: a kernel reads or writes beside its buffers. Each stands against a page that may not be touched.

The walks run in processes of their own: a stray access kills them, and the last line printed names the case.
"""

from __future__ import annotations

import numpy as np
import pytest
from formats import BF16, F16, F32, FORMATS, ONE_PER_PATH, PLAIN, Matrix, decode
from guarded_memory import SIDES, GuardedArray
from harness import (
    SMALL_SWEEP,
    Call,
    arguments,
    bf16_experts,
    build_layer,
    ext,
    load_pointers,
    make_layer,
    poisoned,
    random_call,
    random_experts,
    run,
    same_bits,
)
from isolation import isolated

# (hidden, intermediate): whole panels; nothing whole; odd K (a pair with one column); a single number; long
# rows.
SHAPES = [(64, 64), (33, 70), (31, 65), (72, 40), (1, 1), (15, 3), (2050, 34)]
# For the other methods, also one whose last blocks of 128 x 128 are ragged.
METHOD_SHAPES = [(33, 70), (300, 130), (1, 1)]
TOKENS = (1, 3, 16, 17, 33, 70)
METHOD_TOKENS = (1, 4, 5, 33)
ENGINE = ext.Engine(2)
if SMALL_SWEEP:
    SHAPES, TOKENS = [(64, 64), (33, 70), (1, 1)], (1, 3, 17)
    METHOD_SHAPES, METHOD_TOKENS = [(33, 130)], (1, 17)


def guarded_call(call: Call, side: str) -> tuple[Call, list[GuardedArray]]:
    """The same call with read-only buffers against guard pages."""
    buffers = [GuardedArray(a, side).read_only() for a in (call.hidden, call.ids, call.weights)]
    return Call(*(b.array for b in buffers), call.hidden_dtype), buffers


def check_forward(layer, call: Call, side: str, output_dtype: int) -> None:
    """Same bits as in ordinary memory, every element of the poisoned output written, nothing beside it."""
    expected = run(layer, call, output_dtype)
    tight, inputs = guarded_call(call, side)
    output = GuardedArray(poisoned(call.hidden.shape, output_dtype), side)
    layer.forward(*arguments(tight, output.array, output_dtype))
    assert same_bits(output.array.copy(), expected)
    assert np.isfinite(decode(output.array, output_dtype)).all()
    layer.forward(*arguments(tight, output.array, output_dtype, accumulate=1))
    assert all(buffer.canary_is_intact() for buffer in (*inputs, output))
    for buffer in (*inputs, output):
        buffer.close()


def walk_calls(side: str) -> None:
    engine = ext.Engine(2)
    for format in ONE_PER_PATH:
        for hidden, intermediate in SHAPES if format == PLAIN else METHOD_SHAPES:
            experts = random_experts(hidden, 3, hidden, intermediate, format)
            layer = build_layer(engine, experts)
            for tokens in TOKENS if format == PLAIN else METHOD_TOKENS:
                print(f"{side=} {format} {hidden=} {intermediate=} {tokens=}", flush=True)
                call = random_call(tokens, experts, tokens, top_k=2)
                values = decode(call.hidden, BF16)
                for hidden_dtype, output_dtype, ids_dtype in (
                    (BF16, BF16, np.int64),
                    (F16, F16, np.int32),
                    (F32, F32, np.int64),
                    (BF16, F32, np.int32),
                ):
                    print(f"  {hidden_dtype=} {output_dtype=}", flush=True)
                    typed = call.with_hidden(values, hidden_dtype)
                    typed.ids = call.ids.astype(ids_dtype)
                    check_forward(layer, typed, side, output_dtype)


def guarded_matrix(matrix: Matrix, side: str) -> tuple[list[tuple], list[GuardedArray]]:
    """The pointers of load_experts to copies against guard pages, and these copies."""
    pointers, copies = [], []
    for expert in range(len(matrix.weight)):
        weight = GuardedArray(matrix.weight[expert], side).read_only()
        scale = None if matrix.scale is None else GuardedArray(matrix.scale[expert], side).read_only()
        copies += [copy for copy in (weight, scale) if copy]
        scale_address = scale.array.ctypes.data if scale else 0
        pointers.append((weight.array.ctypes.data, scale_address, float(matrix.factor[expert])))
    return pointers, copies


def walk_loading(side: str) -> None:
    """Expert matrices against guard pages while they are packed, unmapped afterwards."""
    for threads, subpools in ((2, 1), (3, 3)):
        engine = ext.Engine(threads, subpools)
        for format in FORMATS:
            for hidden, intermediate in SHAPES if format == PLAIN else METHOD_SHAPES:
                print(f"{side=} {format} {hidden=} {intermediate=} {subpools=}", flush=True)
                experts = random_experts(hidden, 3, hidden, intermediate, format)
                call = random_call(1, experts, 5, top_k=2)
                layer = make_layer(engine, experts)
                guarded = [guarded_matrix(part, side) for part in experts.parts]
                load_pointers(layer, experts, *(pointers for pointers, _ in guarded))
                copies = [copy for _, copies in guarded for copy in copies]
                assert all(copy.canary_is_intact() for copy in copies)
                for copy in copies:
                    copy.close()
                assert same_bits(run(layer, call), run(build_layer(engine, experts), call))


def walk_masks(side: str) -> None:
    engine = ext.Engine(2)
    for count in (1, 3, 8, 64):
        experts = random_experts(count, count, 40, 24)
        layer = build_layer(engine, experts)
        mask = GuardedArray((np.arange(count) % 2).astype(np.uint8), side).read_only()
        layer.set_expert_mask(mask.array.ctypes.data)
        run(layer, random_call(1, experts, 9, top_k=1))
        assert mask.canary_is_intact()


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("walk", [walk_calls, walk_loading, walk_masks])
def test_nothing_beside_the_buffers_is_touched(walk, side):
    isolated("test_stray_reads_and_writes", walk.__name__, side, timeout=480)


def shifted(tensor: np.ndarray | None) -> np.ndarray | None:
    """A copy at an odd address."""
    if tensor is None:
        return None
    memory = np.empty(tensor.nbytes + 1, np.uint8)
    assert memory.ctypes.data % 2 == 0
    memory[1:] = tensor.reshape(-1).view(np.uint8)
    return memory[1:].view(tensor.dtype).reshape(tensor.shape)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_weights_may_stand_at_any_address(format):
    """Tensors in a file follow each other without padding: after an odd number of bytes, fp32 too."""
    experts = random_experts(1, 2, 300, 130, format)
    expected = build_layer(ENGINE, experts)
    for part in experts.parts:
        part.weight, part.scale = shifted(part.weight), shifted(part.scale)
    call = random_call(1, experts, 9, top_k=2)
    assert same_bits(run(build_layer(ENGINE, experts), call), run(expected, call))


def overrun(side: str) -> None:
    buffer = GuardedArray(np.zeros(8, np.float32), side)
    address = buffer.array.ctypes.data + (32 if side == "after" else -4)
    experts = bf16_experts(*[np.zeros((1, 1, 1), np.uint16)] * 3)
    call = Call(np.zeros((1, 1), np.uint16), np.zeros((1, 1), np.int64), np.ones((1, 1), np.float32))
    arguments_with_stray_output = list(arguments(call, buffer.array, F32))
    arguments_with_stray_output[7] = address
    build_layer(ext.Engine(1), experts).forward(*arguments_with_stray_output)


@pytest.mark.parametrize("side", SIDES)
def test_the_guard_pages_guard(side):
    """Negative control: a kernel that is told to write one element beside the buffer dies."""
    with pytest.raises(AssertionError, match="Segmentation fault"):
        isolated("test_stray_reads_and_writes", "overrun", side)
