"""Risk: an id sent to the wrong side, lost, or read out of bounds, by the torch twin or the Triton kernels.

The twin is compared with the rules in plain Python; the kernels, under Triton's interpreter, with the twin,
bit for bit; and they are compiled for the devices that SGLang serves on, which needs no device. They have not
yet run on one.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cuda_packages import environment_with_triton
from hybrid_models import split as deferral_rule

from kt_kernel.device_ops.block import BlockLayout
from kt_kernel.device_ops.routing import Split, protected_experts_reference, route, route_deferring

FACTOR = 2.5
INT32_MAX = 2**31 - 1


def tables(num_experts: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(slot_of, on_device) of a placement of about half of the experts."""
    generator = torch.Generator().manual_seed(seed)
    on_device = torch.rand(num_experts + 1, generator=generator) < 0.5
    on_device[num_experts] = False
    slot_of = torch.where(on_device, on_device.cumsum(0) - 1, -1).int()
    return slot_of, on_device


def call(seed: int, tokens: int, top_k: int, num_experts: int, hidden_size: int, dtypes=(torch.int32,)):
    """Ids with some of -1, a padded row and impossible ones among them; weights with equal ones and a NaN."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(tokens, num_experts, generator=generator).argsort(dim=1)[:, :top_k]
    weights = torch.randint(1, 4, (tokens, top_k), generator=generator) / 7
    ids[torch.rand(tokens, top_k, generator=generator) < 0.1] = -1
    if tokens > 2:
        ids[1], weights[0, 0] = -1, float("nan")
        for place, impossible in enumerate((num_experts, -2, INT32_MAX)[:top_k]):
            ids[2, place] = impossible
        if dtypes[0] is torch.int64 and top_k > 1:
            ids[0, 0], ids[0, 1] = 2**40, -(2**40) - 1
    hidden = torch.randn(tokens, hidden_size, generator=generator).to(dtypes[-1])
    return ids.to(dtypes[0]).contiguous(), weights, hidden


# ---- the twin against the rules in plain Python ----------------------------------------------------


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("deferred", [0, 1, 3])
def test_every_id_goes_to_exactly_one_side_and_keeps_its_weight(deferred, ids_dtype):
    tokens, top_k, num_experts, hidden_size = 6, 3, 9, 5
    slot_of, on_device = tables(num_experts)
    for seed in range(20):
        ids, weights, hidden = call(
            seed, tokens, top_k, num_experts, hidden_size, (ids_dtype, torch.bfloat16)
        )
        weights.nan_to_num_(0.5)
        counts = torch.zeros(num_experts + 1, dtype=torch.int64)
        split = Split(slot_of, on_device, counts, FACTOR)
        if deferred:
            slots, block = route_deferring(ids, weights, hidden, split, top_k - deferred, num_experts)
        else:
            slots, block = route(ids, weights, hidden, split, num_experts)
        layout = BlockLayout(tokens, top_k, hidden_size, torch.bfloat16)
        assert torch.equal(layout.hidden(block), hidden)
        assert torch.equal(layout.weights(block), weights * FACTOR)
        assert slots.dtype == ids.dtype
        expected_slots, now, later = by_hand(ids, weights, top_k - deferred, slot_of.tolist())
        assert slots.tolist() == expected_slots
        assert layout.ids(block).tolist() == now
        if deferred:
            assert layout.deferred_ids(block).tolist() == later
        flat = ids.flatten().tolist()
        assert counts[1:].tolist() == [flat.count(expert) for expert in range(num_experts)]


def by_hand(ids: torch.Tensor, weights: torch.Tensor, protected_k: int, slot_of: list[int]):
    """(slots, immediate ids, deferred ids) as lists."""
    experts = len(slot_of) - 1
    known = torch.where((ids >= 0) & (ids < experts), ids, -1)
    # An id that is no expert takes no place among the protected ones.
    now, later = deferral_rule(known, weights.masked_fill(known < 0, float("-inf")), protected_k)
    slots = [[slot_of[expert] if expert >= 0 else -1 for expert in row] for row in known.tolist()]

    def on_cpu(rows: list[list[int]]) -> list[list[int]]:
        return [[-1 if e < 0 or slot_of[e] >= 0 else e for e in row] for row in rows]

    immediate = on_cpu(now)
    for row, place in (ids != known).nonzero().tolist():
        immediate[row][place] = max(-(2**31), min(INT32_MAX, int(ids[row, place])))
    return slots, immediate, on_cpu(later)


def test_no_part_overlaps_another_and_large_hidden_states_stay_out():
    for tokens, top_k in itertools.product((1, 3, 64), (1, 6, 8)):
        layout = BlockLayout(tokens, top_k, 72, torch.bfloat16)
        block = torch.arange(layout.bytes, dtype=torch.int64)
        offsets = (0, layout.deferred_ids_offset, layout.weights_offset, layout.hidden_offset)
        assert all(offset % 64 == 0 for offset in offsets)
        assert all(after - before >= 4 * tokens * top_k for before, after in itertools.pairwise(offsets))
        assert layout.bytes == len(block) == layout.hidden_offset + tokens * 72 * 2
    assert BlockLayout(73, 8, 7168, torch.bfloat16).packs_hidden
    large = BlockLayout(74, 8, 7168, torch.bfloat16)
    assert not large.packs_hidden and large.packed_bytes == large.hidden_offset
    hidden = torch.zeros(74, 7168, dtype=torch.bfloat16)
    ids = torch.zeros(74, 8, dtype=torch.int32)
    assert route(ids, torch.ones(74, 8), hidden, Split(), 4)[1].numel() == large.hidden_offset


# ---- the kernels against the twin, in a process that has triton -------------------------------------


def with_triton(function: str, **variables: str) -> None:
    environment = environment_with_triton(**variables)
    here = Path(__file__).parent
    environment["PYTHONPATH"] += f":{here}:{here.parent}:{here.parent / 'api'}"
    code = f"import test_routing; test_routing.{function}()"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_kernels_equal_the_twin_bit_for_bit():
    with_triton("compare_kernels_with_the_twin", TRITON_INTERPRET="1")


def test_kernels_touch_nothing_beside_their_outputs():
    with_triton("watch_the_neighbours", TRITON_INTERPRET="1")


def test_each_operator_is_the_promised_number_of_device_operations():
    with_triton("count_launches", TRITON_INTERPRET="1")


def test_kernels_compile_for_the_devices_that_are_served(tmp_path):
    with_triton("compile_for_devices", TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))


_SHAPES = (  # tokens, top_k, experts, hidden size
    (0, 8, 16, 64),
    (1, 8, 256, 7168),
    (1, 1, 1, 1),
    (2, 6, 160, 1000),
    (7, 16, 1024, 33),
    (40, 3, 64, 100),
    (130, 4, 32, 8),
    (80, 2, 8, 7168),  # hidden states not packed
)
_DTYPES = (
    (torch.int32, torch.bfloat16),
    (torch.int64, torch.float32),
    (torch.int32, torch.float16),
    (torch.int64, torch.bfloat16),
)


def _arguments(shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], protected_k: int):
    """The arguments of `route`, all parts asked for."""
    tokens, top_k, num_experts, hidden_size = shape
    ids, weights, hidden = call(tokens, tokens, top_k, num_experts, hidden_size, dtypes)
    slot_of, on_device = tables(num_experts)
    counts = torch.zeros(num_experts + 1, dtype=torch.int64)
    protected = protected_experts_reference(ids, weights, FACTOR, protected_k, num_experts)
    return ids, weights, hidden, slot_of, on_device, counts, protected, FACTOR, num_experts


def compare_kernels_with_the_twin() -> None:
    from kt_kernel.device_ops import routing_triton
    from kt_kernel.device_ops.routing import route_reference

    for number, shape in enumerate(_SHAPES):
        _, top_k, num_experts, _ = shape
        dtypes = _DTYPES[number % len(_DTYPES)]
        for protected_k in {0, 1, top_k // 2, top_k}:
            ids, weights, *_ = _arguments(shape, dtypes, protected_k)
            rule = ids, weights, FACTOR, protected_k, num_experts
            marked = routing_triton.protected_experts(*rule)[:num_experts]
            assert torch.equal(marked, protected_experts_reference(*rule)[:num_experts]), (shape, protected_k)
        complete = _arguments(shape, dtypes, top_k // 2)
        for left_out in (None, "deferral", "device", "cpu", "counts"):
            results = []
            for implementation in (routing_triton.route, route_reference):
                arguments = list(complete)
                arguments[5] = None if left_out == "counts" else torch.zeros_like(complete[5])
                for place in {"deferral": (6,), "device": (3, 4), "cpu": (2, 6)}.get(left_out, ()):
                    arguments[place] = None
                slots, block = implementation(*arguments)
                results.append([slots, *_parts(block, arguments), arguments[5]])
            for ours, twin in zip(*results, strict=True):
                assert (ours is None) == (twin is None)
                assert ours is None or _same_bits(ours, twin), (shape, dtypes, left_out)


def _parts(block: torch.Tensor, arguments: list) -> list[torch.Tensor]:
    """What `route` has written into `block`."""
    ids, _, hidden, *_, protected, _, _ = arguments
    if hidden is None:
        return [block]
    layout = BlockLayout(*ids.shape, hidden.shape[1], hidden.dtype)
    parts = [layout.ids(block), layout.weights(block)]
    if protected is not None:
        parts.append(layout.deferred_ids(block))
    return [*parts, layout.hidden(block)] if layout.packs_hidden else parts


def _same_bits(ours: torch.Tensor, twin: torch.Tensor) -> bool:
    if ours.shape != twin.shape or ours.dtype != twin.dtype:
        return False
    if ours.dtype is torch.int64 and ours.dim() == 1:  # counts: entry 0 is nobody's
        ours, twin = ours[1:].clone(), twin[1:].clone()
    return torch.equal(ours.contiguous().view(torch.uint8), twin.contiguous().view(torch.uint8))


def watch_the_neighbours() -> None:
    """Outputs and tables are pieces of larger tensors, whose other bytes must stay, and must not matter."""
    from kt_kernel.device_ops import routing_triton

    margin, surroundings = 256, []
    plain_outputs = routing_triton.outputs_of_route

    def between_margins(tensor: torch.Tensor) -> torch.Tensor:
        size = tensor.numel() * tensor.itemsize
        surroundings.append((torch.full((size + 2 * margin,), 0xA5, dtype=torch.uint8), size))
        inner = surroundings[-1][0][margin : margin + size]
        return inner.view(tensor.dtype).view(tensor.shape)

    def surrounded(*arguments):
        return tuple(between_margins(tensor) for tensor in plain_outputs(*arguments))

    for shape in ((1, 8, 16, 64), (5, 3, 7, 33), (40, 6, 64, 100)):
        arguments = list(_arguments(shape, (torch.int64, torch.bfloat16), 1))
        expected_slots, expected_block = routing_triton.route(*arguments)
        for place in range(7):
            value = arguments[place]
            arguments[place] = between_margins(value)
            arguments[place].copy_(value)
        routing_triton.outputs_of_route = surrounded
        slots, block = routing_triton.route(*arguments)
        routing_triton.outputs_of_route = plain_outputs
        assert torch.equal(slots, expected_slots)
        for ours, alone in zip(_parts(block, arguments), _parts(expected_block, arguments), strict=True):
            assert _same_bits(ours, alone)
        written = torch.zeros(block.numel(), dtype=torch.bool)
        for part in _parts(block, arguments):
            start = part.data_ptr() - block.data_ptr()
            written[start : start + part.numel() * part.itemsize] = True
        assert bool((block[~written] == 0xA5).all()), "the gaps between the parts were written"
        for whole, size in surroundings:
            assert bool((whole[:margin] == 0xA5).all() and (whole[margin + size :] == 0xA5).all())


def count_launches() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    from kt_kernel.device_ops import routing_triton

    operations = []

    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name = function.overloadpacket.__name__
            returned = function._schema.returns[0].alias_info
            if "empty" not in name and not (returned and not returned.is_write):
                operations.append(name)
            return function(*args, **(kwargs or {}))

    class Launches:
        def __init__(self, name: str) -> None:
            self._name, self._kernel = name, getattr(routing_triton, name)

        def __getitem__(self, grid):
            operations.append(self._name)

            def launch(*arguments) -> None:
                with torch.utils._python_dispatch._disable_current_modes():
                    self._kernel[grid](*arguments)

            return launch

    for name in ("mark_protected", "route_call"):
        setattr(routing_triton, name, Launches(name))
    arguments = _arguments((5, 3, 8, 64), (torch.int32, torch.bfloat16), 1)
    with Log():
        routing_triton.protected_experts(*arguments[:2], FACTOR, 1, 8)
        assert operations == ["zeros", "mark_protected"]
        operations.clear()
        routing_triton.route(*arguments)
        assert operations == ["route_call"]


def compile_for_devices() -> None:
    """To machine code, with the assembler of the triton wheel."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from kt_kernel.device_ops import routing_triton

    integers = dict.fromkeys(("tokens", "num_experts", "values", "protected_k"), "i32")
    pointers = {
        "ids": "*i32", "weights": "*fp32", "slot_of": "*i32", "on_device": "*u8", "protected": "*u8",
        "counts": "*i64", "slots": "*i32", "cpu_ids": "*i32", "cpu_deferred_ids": "*i32",
        "cpu_weights": "*fp32", "hidden": "*i16", "cpu_hidden": "*i16",
    }  # fmt: skip
    constants = {"TOP_K": 6, "LANES": 8, "PIECE": 1024}
    kinds = integers | pointers | {"factor": "fp32"} | dict.fromkeys(constants, "constexpr")
    other_kinds = {"ids": "*i64", "slots": "*i64", "hidden": "*i32", "cpu_hidden": "*i32"}
    for capability, kernel, changed in itertools.product(
        (80, 89, 90, 100, 120), (routing_triton.route_call, routing_triton.mark_protected), ({}, other_kinds)
    ):
        names = kernel.arg_names
        source = ASTSource(
            kernel,
            {name: (kinds | changed)[name] for name in names},
            constexprs={name: value for name, value in constants.items() if name in names},
            attrs={(names.index(name),): [["tt.divisibility", 16]] for name in names if name in pointers},
        )
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        assert compiled.asm["cubin"], (capability, kernel)
