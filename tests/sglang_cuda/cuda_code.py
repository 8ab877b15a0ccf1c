"""SGLang's CUDA code in a process of a machine without a GPU.

    enter((9, 0))       before SGLang is imported: `is_cuda()` is then true, of that compute capability
    ...                 import sglang.srt...; call its methods with tensors on "cpu" or on "meta"
    CALLS               what reached a GPU: packages that only a GPU has, and Triton kernels

Packages that exist for GPUs only are replaced by ones that have every name and record every call. Triton is a
real one (`.venv/kt-cuda/triton`), whose launches are recorded, too. Nothing is computed: a call returns its
first tensor, unless `RESULTS` says better.

For a process of its own: `environment()` goes to tests/kernels/isolation.py's `isolated`.
"""

from __future__ import annotations

import enum
import importlib
import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

CAPABILITIES = ((8, 0), (8, 9), (9, 0), (10, 0), (12, 0))

_NAMES = {8: "NVIDIA A100", 9: "NVIDIA H100 80GB HBM3", 10: "NVIDIA B200", 12: "NVIDIA RTX PRO 6000"}
_ABSENT = frozenset(
    (
        "sgl_kernel",
        "flashinfer",
        "deep_gemm",
        "sgl_deep_gemm",
        "torchvision",
        "torchaudio",
        "cutlass",
        "cuda",
        "tilelang",
        "quack",
        "fla",
        "decord",
        "triton_kernels",
    )
)


def capability_of(text: str) -> tuple[int, int]:
    """ "9.0" -> (9, 0)"""
    major, minor = text.split(".")
    return int(major), int(minor)


def environment() -> dict[str, str]:
    """Variables of a process that calls `enter`."""
    packages = Path(sys.prefix) / "kt-cuda" / "triton"
    return {
        "PYTHONPATH": f"{packages}:{Path(__file__).parent}",
        "KT_SGLANG_CPU_SHIMS": "0",
        # A test that imported SGLang in the process that starts this one has set it.
        "SGLANG_USE_CPU_ENGINE": "0",
        "SGLANG_JIT_DEEPGEMM_PRECOMPILE": "0",
        "TORCHDYNAMO_DISABLE": "1",
    }


@dataclass(frozen=True)
class Call:
    """One call that reached a GPU: `entry` is the function's full name."""

    entry: str
    args: tuple[Any, ...]
    keywords: dict[str, Any] = field(default_factory=dict)


CALLS: list[Call] = []

# What absent functions return, by the last part of their name. Arguments are the call's.
RESULTS: dict[str, Callable[..., Any]] = {}


def record(entry: str, args: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    CALLS.append(Call(entry, args, dict(keywords)))
    result = RESULTS.get(entry.rpartition(".")[2])
    if result is not None:
        return result(*args, **keywords)
    tensors = [value for value in (*args, *keywords.values()) if isinstance(value, torch.Tensor)]
    return tensors[0] if tensors else Absent(f"{entry}()")


class Absent:
    """Anything an absent package is asked for: a function, a class, a decorator, a constant."""

    def __init__(self, entry: str = "absent", *bases: Any, **keywords: Any) -> None:
        self._entry = entry if isinstance(entry, str) else "absent"

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        if len(args) == 1 and not keywords and isinstance(args[0], types.FunctionType | type):
            return args[0]  # used as a decorator
        return record(self._entry, args, keywords)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = Absent(f"{self._entry}.{name}")
        setattr(self, name, value)
        return value

    def __iter__(self) -> Any:
        return iter(())

    def __mro_entries__(self, bases: Any) -> tuple[type, ...]:
        return (object,)

    def __or__(self, other: Any) -> Any:
        return other

    __ror__ = __or__

    def __lt__(self, other: Any) -> bool:
        return False

    def __ge__(self, other: Any) -> bool:
        return True

    __le__, __gt__ = __lt__, __ge__

    def __bool__(self) -> bool:
        return True

    def __int__(self) -> int:
        return 0

    __index__ = __int__

    def __getitem__(self, key: Any) -> Any:
        return Absent(f"{self._entry}[{key}]")

    def __repr__(self) -> str:
        return self._entry


class _AbsentModule(types.ModuleType):
    __version__ = "9.9.9"

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = Absent(f"{self.__name__}.{name}")
        setattr(self, name, value)
        return value


class _AbsentPackages(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.partition(".")[0] in _ABSENT:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        return _AbsentModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


class _Stream:
    cuda_stream = 0

    def __init__(self, *args: Any, **keywords: Any) -> None: ...

    def wait_stream(self, other: Any) -> None: ...

    def synchronize(self) -> None: ...


def enter(capability: tuple[int, int]) -> None:
    """Make this process believe in a GPU; once, before SGLang is imported."""
    if "sglang.srt.utils" in sys.modules:
        raise RuntimeError("SGLang is imported already: enter() must come first")
    # They look at the types of GPU packages while they are imported, so they get no stand-ins.
    for module in ("transformers.generation.continuous_batching.utils", "tvm_ffi", "xgrammar"):
        importlib.import_module(module)
    from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer  # noqa: F401

    _believe_in_a_gpu(capability)
    sys.meta_path.insert(0, _AbsentPackages())
    _values_of_absent_packages()
    _record_triton()
    _record_compiled_kernels()
    _run_custom_operators_on_the_cpu()
    importlib.import_module("sglang.srt.layers.moe.fused_moe_triton.layer")

    # Only now: while SGLang is imported, it asks which operators exist.
    torch.ops.sgl_kernel = Absent("torch.ops.sgl_kernel")


def _believe_in_a_gpu(capability: tuple[int, int]) -> None:
    properties = types.SimpleNamespace(
        name=_NAMES[capability[0]],
        major=capability[0],
        minor=capability[1],
        multi_processor_count=132,
        total_memory=80 << 30,
        shared_memory_per_block_optin=232448,
        is_integrated=False,
    )
    torch.version.cuda = "13.0"
    cuda = torch.cuda
    cuda.is_available = lambda: True
    cuda.device_count = lambda: 1
    cuda.current_device = lambda: 0
    cuda.get_device_capability = lambda *_: capability
    cuda.get_device_name = lambda *_: properties.name
    cuda.get_device_properties = lambda *_: properties
    cuda.is_current_stream_capturing = lambda: False
    cuda.current_stream = lambda *_: _Stream()
    cuda.mem_get_info = lambda *_: (79 << 30, 80 << 30)
    cuda.empty_cache = cuda.synchronize = lambda *_: None
    cuda.Stream = _Stream


class MemoryOnTheCpu(TorchFunctionMode):
    """Tensors that are asked for on the GPU are made on the CPU."""

    def __torch_function__(self, function: Any, kinds: Any, args: Any = (), keywords: Any = None) -> Any:
        keywords = dict(keywords or {})
        if torch.device(keywords.get("device") or "cpu").type == "cuda":
            keywords["device"] = "cpu"
        return function(*args, **keywords)


def _record_triton() -> None:
    from triton.runtime.jit import JITFunction

    def launch(kernel: JITFunction, *args: Any, **keywords: Any) -> Any:
        return record(f"triton.{kernel.fn.__module__}.{kernel.fn.__name__}", args, keywords)

    JITFunction.run = launch


def _record_compiled_kernels() -> None:
    """Kernels that SGLang compiles when they are first used."""
    import sglang.kernels.jit.utils.compile.loader

    def load(*names: str, **sources: Any) -> Absent:
        return Absent(f"jit.{'_'.join(map(str, names))}")

    original = sglang.kernels.jit.utils.compile.loader.load_jit
    for module in list(sys.modules.values()):
        if getattr(module, "load_jit", None) is original:
            module.load_jit = load


def _run_custom_operators_on_the_cpu() -> None:
    """SGLang's own operators are Python functions registered for CUDA tensors alone; ours have CPU twins."""
    original = torch.library.Library.impl

    def impl(library: Any, name: Any, function: Any, key: str = "", **keywords: Any) -> None:
        original(library, name, function, key, **keywords)
        if key == "CUDA" and library.ns != "kt_kernel":
            original(library, name, function, "CPU", **keywords)

    torch.library.Library.impl = impl


class ActivationType(enum.IntEnum):
    """FlashInfer's, as far as SGLang asks for it by name."""

    Gelu = 0
    Relu = 1
    Silu = 2
    Swiglu = 3
    Geglu = 4
    SwigluBias = 5
    Relu2 = 6
    Identity = 7
    Situ = 8


def _values_of_absent_packages() -> None:
    for module in ("flashinfer.fused_moe.core", "flashinfer.tllm_enums", "flashinfer.fused_moe"):
        importlib.import_module(module).ActivationType = ActivationType
    for name in ("get_num_sms", "get_mk_alignment_for_contiguous_layout", "get_tma_aligned_size"):
        RESULTS[name] = lambda *_, **__: 128


def quantised_in_pairs(
    x: torch.Tensor | None = None, *_: Any, **named: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """FlashInfer's quantisation of activations: codes and scales."""
    x = named["input"] if x is None else x
    return x, x.new_ones(x.shape[0], 1)


for _name in ("mxfp8_quantize", "fp4_quantize", "nvfp4_quantize", "scaled_fp4_quant"):
    RESULTS[_name] = quantised_in_pairs
