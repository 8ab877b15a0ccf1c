"""Runs in a process of its own: every row of rows.py on one GPU, each against SGLang's own layer.

    run("9.0")      prints one JSON line per row: its place in ROWS, the outcome, what is wrong or refused

What is asked of a layer that works: tensors are those of SGLang's own layer with slots in the place of
experts, and so are the values made from the checkpoint; every function that it calls is called as SGLang
calls it, with a tensor where SGLang has one; the routed scaling factor is applied in the same place.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
import traceback
from collections.abc import Iterator
from typing import Any

import cuda_code
import torch
from rows import ROWS, Row


def run(capability: str) -> None:
    cuda_code.enter(cuda_code.capability_of(capability))
    record_entries()
    # What a kernel of the GPU would have written is then equal in both layers.
    torch.use_deterministic_algorithms(True, warn_only=True)
    for place, row in enumerate(ROWS):
        outcome, what = outcome_of(row)
        print(json.dumps([place, outcome, what]), flush=True)
    check_gpt_oss_without_experts()


def check_gpt_oss_without_experts() -> None:
    """A GPU for which SGLang has no kernels of gpt-oss's experts can still have everything else."""
    import layer_formats
    from layers import served

    with served("triton"):
        attributes = layer_formats.ATTRIBUTES["mxfp4_biased"]
        check_no_slots(loaded(layer_formats.mxfp4_biased(), 0, attributes))


def outcome_of(row: Row) -> tuple[str, str]:
    """ "works", "refused", "not SGLang" or "wrong", and the sentence."""
    import layer_formats
    from layers import FACTOR, SLOTS, served

    from kt_kernel.errors import FeatureUnavailableError
    from kt_kernel.integrations.sglang import device_backends

    config = getattr(layer_formats, row.format)
    factor = 1.0 if row.format.startswith("compressed_nvfp4") and not row.refused else FACTOR
    attributes = {"routed_scaling_factor": factor, **layer_formats.ATTRIBUTES.get(row.format, {})}
    if row.format == "gptq":
        attributes["params_dtype"] = torch.float16
    try:
        with served(row.backend):
            try:
                device_backends.check_option(row.backend)
                ours = loaded(config(), SLOTS, attributes)
            except FeatureUnavailableError as error:
                return "refused", str(error)
            stock = loaded(config(), None, attributes)
            theirs = calls_of(stock)
    except (AssertionError, NotImplementedError, RuntimeError, ValueError) as error:
        return "not SGLang", f"{type(error).__name__}: {error}"
    try:
        with served(row.backend):
            compare_tensors(ours, stock)
            assert ours.should_fuse_routed_scaling_factor_in_topk is bool(
                stock.should_fuse_routed_scaling_factor_in_topk
            ), "the routed scaling factor is applied in another place than SGLang's"
            compare_calls(calls_of(ours), theirs, ours)
            check_no_slots(loaded(config(), 0, attributes))
    except Exception:
        return "wrong", traceback.format_exc()
    return "works", str(ours.runner_backend.value)


# ---- loading --------------------------------------------------------------------------------------


def loaded(config: Any, slots: int | None, attributes: dict[str, Any]) -> torch.nn.Module:
    """A layer whose every expert has values of its own, after SGLang's processing."""
    from layers import EXPERTS, make_layer

    layer = make_layer(config, slots, **attributes)
    placement = None if slots is None else layer.quant_method.placement.current
    experts = range(EXPERTS) if placement is None else placement.expert_of_slot
    for name, parameter in layer.named_parameters():
        if name.endswith("input_scale"):
            for expert in range(EXPERTS):
                for shard in ("w2",) if name.startswith("w2") else ("w1", "w3"):
                    load = parameter.weight_loader
                    load(parameter, torch.tensor(1.0 + expert), f"experts.{name}", shard, expert_id=expert)
        else:
            for slot, expert in enumerate(experts):
                fill(parameter.data[slot], seed=expert)
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def fill(tensor: torch.Tensor, seed: int) -> None:
    """Small positive numbers, whatever the type: bytes of codes, and powers of two as scales."""
    generator = torch.Generator().manual_seed(seed)
    if tensor.dtype in (torch.float32, torch.bfloat16, torch.float16):
        # One per expert: methods warn, or fail, where gate and up disagree.
        tensor.fill_(float(torch.rand(1, generator=generator)) + 0.5)
    elif tensor.dtype == torch.int32:
        tensor.copy_(torch.randint(0, 1 << 30, tensor.shape, generator=generator))
    else:
        codes = torch.randint(0x20, 0x40, tensor.shape, generator=generator, dtype=torch.uint8)
        tensor.view(torch.uint8).copy_(codes)


# ---- tensors --------------------------------------------------------------------------------------


def tensors_of(layer: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {name: value for name, value in vars(layer).items() if isinstance(value, torch.Tensor)}
    return (
        found | {name: value.data for name, value in layer.named_parameters()} | dict(layer.named_buffers())
    )


def compare_tensors(ours: torch.nn.Module, stock: torch.nn.Module) -> None:
    """Equal where there is no dimension of experts; else a slot's part is its expert's."""
    from layers import EXPERTS, SLOTS

    experts = list(ours.quant_method.placement.current.expert_of_slot)
    mine, theirs = tensors_of(ours), tensors_of(stock)
    assert mine.keys() == theirs.keys(), mine.keys() ^ theirs.keys()
    for name, tensor in theirs.items():
        found = mine[name]
        assert found.dtype == tensor.dtype, (name, found.dtype, tensor.dtype)
        if tensor.shape[:1] == (EXPERTS,) and found.shape[:1] == (EXPERTS,):
            assert name.endswith("_input_scale"), f"{name} {tuple(found.shape)} is as long as all experts"
            found = found[:SLOTS]
        if tensor.shape[:1] == (EXPERTS,):
            tensor = tensor[experts]
        assert found.shape == tensor.shape, (name, tuple(found.shape), tuple(tensor.shape))
        assert torch.equal(bytes_of(found), bytes_of(tensor)), f"{name} has other values than SGLang's"


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def check_no_slots(layer: torch.nn.Module) -> None:
    from layers import EXPERTS

    for name, tensor in tensors_of(layer).items():
        if name.endswith("_input_scale"):
            assert tensor.shape[:1] in ((0,), (EXPERTS,)), name
        else:
            assert tensor.numel() == 0, f"{name} {tuple(tensor.shape)} without device experts"


# ---- calls ----------------------------------------------------------------------------------------


def record_entries() -> None:
    """The functions of SGLang at which a method hands over: recorded, checked, and run."""
    from sglang.srt.layers.moe.fused_moe_triton import fused_marlin_moe
    from sglang.srt.layers.moe.moe_runner import MoeRunner

    MoeRunner.run = recorded("MoeRunner.run", MoeRunner.run)
    original = fused_marlin_moe.fused_marlin_moe
    replacement = recorded("fused_marlin_moe", original)
    for module in list(sys.modules.values()):
        if getattr(module, "fused_marlin_moe", None) is original:
            module.fused_marlin_moe = replacement


def recorded(name: str, function: Any) -> Any:
    signature = inspect.signature(function)

    def call(*args: Any, **keywords: Any) -> Any:
        bound = signature.bind(*args, **keywords)
        for parameter in signature.parameters.values():
            if "Tensor" in str(parameter.annotation) and "Optional" not in str(parameter.annotation):
                assert bound.arguments.get(parameter.name, 0) is not None, f"{name}: no {parameter.name}"
        cuda_code.CALLS.append(cuda_code.Call(name, args, keywords))
        return function(*args, **keywords)

    return call


def calls_of(layer: torch.nn.Module) -> list[cuda_code.Call]:
    from layers import compute

    cuda_code.CALLS.clear()
    with cuda_code.MemoryOnTheCpu():
        compute(layer)
    return list(cuda_code.CALLS)


def compare_calls(ours: list[cuda_code.Call], theirs: list[cuda_code.Call], layer: torch.nn.Module) -> None:
    """The same functions in the same order, with a tensor or None where SGLang's own call has it."""
    from layers import EXPERTS, SLOTS

    def name(call: cuda_code.Call) -> str:
        return call.entry.removesuffix("_filtered")  # the activation's kernel that looks for ids of -1

    assert [name(call) for call in ours] == [name(call) for call in theirs]
    assert theirs, "nothing reached the GPU"
    for mine, other in zip(ours, theirs, strict=True):
        if mine.entry != other.entry:
            continue
        found, expected = dict(parts(mine)), dict(parts(other))
        assert found.keys() == expected.keys(), (mine.entry, found.keys() ^ expected.keys())
        for path, value in expected.items():
            assert (found[path] is None) == (value is None), f"{mine.entry}: {path} is {found[path]!r}"
            if not isinstance(value, torch.Tensor):
                continue
            assert found[path].dtype == value.dtype, (mine.entry, path)
            if value.shape[:1] == (EXPERTS,):
                assert found[path].shape == (SLOTS, *value.shape[1:]), (mine.entry, path)
        check_ids(mine, layer)


def check_ids(call: cuda_code.Call, layer: torch.nn.Module) -> None:
    """Ids of -1 reach the runners that skip them, and no other."""
    from kt_kernel.integrations.sglang.device_backends import SKIPPING

    if call.entry == "MoeRunner.run":
        ids = call.args[1].topk_output.topk_ids
        assert bool((ids < 0).any()) is (layer.runner_backend.value in SKIPPING), ids


def parts(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of a call's arguments, by name."""
    if isinstance(value, cuda_code.Call):
        yield from parts(list(value.args), path)
        yield from parts(value.keywords, path)
    elif isinstance(value, dict):
        for name, part in value.items():
            yield from parts(part, f"{path}.{name}")
    elif isinstance(value, torch.Tensor | torch.nn.Module):
        yield path, value
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for entry in dataclasses.fields(value):
            if entry.name not in ("layer", "runner_config"):
                yield from parts(getattr(value, entry.name), f"{path}.{entry.name}")
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        yield from parts(value._asdict(), path)
    elif isinstance(value, list | tuple):
        for place, part in enumerate(value):
            yield from parts(part, f"{path}[{place}]")
    else:
        yield path, value
