"""Runs in a process of its own: slots that we fill against slots that SGLang loads, bit by bit.

The only thing that is not SGLang's own code is the kernel that repacks 4-bit codes; its stand-in follows the
layout of the CUDA source, word by word.
"""

from __future__ import annotations

import contextlib
import dataclasses
from types import SimpleNamespace

import cuda_code
import torch

EXPERTS = (0, 2)
SLOT = 1
_ROWS_OF_A_THREAD = (0, 1, 8, 9)  # inputs of a tile, from twice the thread's place in its group of four
_ORDER_IN_A_WORD = (0, 2, 4, 6, 1, 3, 5, 7)


def repack(words: torch.Tensor, order: torch.Tensor, out: torch.Tensor, k: int, n: int, bits: int) -> None:
    """[K/8, N] words of eight inputs -> [K/16, 2 N]: a word per thread and warp of each 16 x 64 tile."""
    assert bits == 4 and order.numel() == 0 and words.shape == (k // 8, n) and words.is_contiguous()
    shifts = torch.arange(0, 32, 4)
    codes = ((words.long()[:, None, :] >> shifts[None, :, None]) & 15).reshape(k // 16, 16, n // 64, 64)
    codes = codes.permute(0, 2, 1, 3)  # [tiles of K, tiles of N, 16, 64]
    thread, warp = torch.meshgrid(torch.arange(32), torch.arange(4), indexing="ij")
    outputs = warp * 16 + thread // 4
    values = [
        codes[:, :, thread % 4 * 2 + row, outputs + second] for second in (0, 8) for row in _ROWS_OF_A_THREAD
    ]
    packed = sum(values[source] << (4 * place) for place, source in enumerate(_ORDER_IN_A_WORD))
    packed = torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32)
    out.copy_(packed.reshape(k // 16, 2 * n))


def enter(capability: str) -> None:
    cuda_code.enter(cuda_code.capability_of(capability))
    from sglang.kernels.ops.quantization import gptq_marlin_repack

    gptq_marlin_repack._jit_gptq_marlin_repack_module = lambda: SimpleNamespace(gptq_marlin_repack=repack)


def loaded_layer(case) -> torch.nn.Module:
    """The layer as SGLang loads it without us."""
    import layers
    from slot_checkpoints import PROJECTIONS

    layers.EXPERTS, layers.HIDDEN, layers.INTERMEDIATE = 3, case.encoding.hidden, case.encoding.intermediate
    layer = layers.make_layer(case.config())
    for expert in range(layers.EXPERTS):
        for (shard, suffix), tensor in case.tensors(expert if expert in EXPERTS else 0).items():
            name = f"{'w2' if shard == 'w2' else 'w13'}_{suffix}"
            loaded = f"experts.{expert}.{PROJECTIONS[shard]}_proj.{suffix}"
            parameter = getattr(layer, name)
            parameter.weight_loader(parameter, tensor, loaded, shard_id=shard, expert_id=expert)
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def check_slots(capability: str) -> None:
    """Every case that runs on this GPU, on one rank and as each of two; prints which were compared."""
    enter(capability)
    from slot_checkpoints import CASES

    for name, case in CASES.items():
        if case.capability == capability:
            for ranks in case.ranks:
                for rank in range(ranks):
                    _check_case(name, case, rank, ranks)
                    print(f"compared: {name}, rank {rank} of {ranks}")
    if capability == "9.0":
        _check_that_scales_of_all_ranks_are_no_slot(CASES["GPTQ, groups of 128"])
        _check_two_global_scales(CASES["NVFP4 of ModelOpt"])


def _on_rank(backend: str, rank: int, ranks: int):
    import layers
    from sglang.srt.runtime_context import get_parallel

    stack = contextlib.ExitStack()
    stack.enter_context(layers.served(backend))
    group = SimpleNamespace(world_size=ranks)
    sizes = {"tp_size": ranks, "attn_tp_size": ranks, "moe_tp_size": ranks}
    stack.enter_context(get_parallel().override(**sizes, moe_tp_rank=rank, tp_rank=rank, tp_group=group))
    return stack


def _check_that_scales_of_all_ranks_are_no_slot(case) -> None:
    from kt_kernel.integrations.sglang.spare_layers import native_layer

    with _on_rank(case.backend, 0, 2):
        layer = loaded_layer(case)
        encoding = dataclasses.replace(case.encoding, ranks=2)
        assert native_layer(layer, layer.quant_method, 2, encoding) is None


def _check_two_global_scales(case) -> None:
    """Gate's is twice up's: the same slot as with gate's for both, and up's group scales halved."""
    from slot_checkpoints import image

    from kt_kernel.integrations.sglang.spare_layers import native_layer

    with _on_rank(case.backend, 0, 1):
        layer = loaded_layer(case)
        spare = native_layer(layer, layer.quant_method, 2, case.encoding)
        tensors = image(case, 0, 0, 1)
        gate, up, down = tensors.global_scales
        halved = tensors.w13_scale.float()
        halved[case.encoding.share :] /= 2
        one = tensors._replace(w13_scale=halved.to(tensors.w13_scale.dtype))
        two = tensors._replace(global_scales=torch.stack((gate, up / 2, down)))
        for slot, stored in enumerate((one, two)):
            spare.form.store(spare.layer, slot, stored)
        for name in spare.form.names:
            first, second = getattr(spare.layer, name).data
            assert torch.equal(_as_bytes(first), _as_bytes(second)), name


def _check_case(name: str, case, rank: int, ranks: int) -> None:
    from slot_checkpoints import image

    from kt_kernel.integrations.sglang.slot_formats import maker_of, slot_format
    from kt_kernel.integrations.sglang.spare_layers import native_layer

    encoding = dataclasses.replace(case.encoding, ranks=ranks)
    with _on_rank(case.backend, rank, ranks):
        layer = loaded_layer(case)
        method = layer.quant_method
        assert type(maker_of(layer, method)).__name__ == case.maker, (name, type(method))
        form = slot_format(layer, method, encoding)
        spare = native_layer(layer, method, len(EXPERTS), encoding)
        assert form is not None and spare is not None and spare.form.is_like(form), name
        for expert in EXPERTS:
            tensors = image(case, expert, rank, ranks)
            spare.form.store(spare.layer, SLOT, tensors)
            _check_slot(name, spare, layer, expert)
            places = spare.form.places(spare.layer, SLOT)
            for place, part in zip(places or (), tensors if places else (), strict=True):
                assert place is None or torch.equal(_as_bytes(place), _as_bytes(part)), name
        if ranks == 1:
            _check_that_a_wrong_store_is_seen(name, spare, layer, image(case, 0, rank, ranks))
        _check_bytes(name, spare, encoding)


def _check_slot(name: str, spare, layer: torch.nn.Module, expert: int) -> None:
    for tensor in spare.form.names:
        found, expected = getattr(spare.layer, tensor), getattr(layer, tensor)
        assert found.dtype == expected.dtype and found.shape[1:] == expected.shape[1:], (name, tensor)
        assert torch.equal(_as_bytes(found[SLOT]), _as_bytes(expected[expert])), (name, tensor, expert)


def _check_that_a_wrong_store_is_seen(name: str, spare, layer: torch.nn.Module, tensors) -> None:
    """One byte of each part in another place: the comparison must notice every one of them."""
    for part, (what, tensor) in enumerate(zip(tensors._fields, tensors, strict=True)):
        if tensor is None:
            continue
        wrong = tensor.clone()
        octets = wrong.reshape(-1).view(torch.uint8)
        octets[: octets.numel() // 2] = octets[: octets.numel() // 2].flip(0)
        if torch.equal(_as_bytes(wrong), _as_bytes(tensor)):
            continue
        changed = list(tensors)
        changed[part] = wrong
        try:
            spare.form.store(spare.layer, SLOT, type(tensors)(*changed))
            _check_slot(name, spare, layer, 0)
        except (AssertionError, ValueError):
            continue
        raise AssertionError(f"{name}: a wrong {what} was not seen")


def _check_bytes(name: str, spare, encoding) -> None:
    """Two whole layers of slots cost at most 2.2 times a layer of the checkpoint, read from the tensors."""
    slots = len(EXPERTS)
    held = sum(tensor.nbytes for tensor in spare.layer.parameters(recurse=False))
    # MXFP4's scales have one byte in the checkpoint and two in an image.
    scales = (encoding.w13_scale, encoding.w2_scale)
    stored = encoding.w13_weight.bytes + encoding.w2_weight.bytes
    stored += sum(scale.bytes for scale in scales) // (2 if encoding.method == "MXFP4" else 1)
    if "padded" not in name:
        assert 2 * held <= 2.2 * slots * stored, (name, held, slots * stored)
