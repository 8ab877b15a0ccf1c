"""The compiled extension; csrc/*bindings.cc say more. Written by scripts/extension_stub.py."""

from collections.abc import Sequence
from typing import Any

class DeviceCopies:
    def __init__(self) -> None: ...
    def mark_used(self, buffer: int) -> None: ...

class Engine:
    def __init__(self, threads: int, subpools: int = 1, numa_nodes: Sequence[int] | None = None) -> None: ...
    @property
    def in_own_process(self) -> bool: ...
    @property
    def numa_nodes(self) -> list[int]: ...
    @property
    def pending(self) -> int: ...
    def raise_pending_error(self) -> None: ...
    def stats(self) -> dict[str, Any]: ...
    @property
    def subpools(self) -> int: ...
    def sync(self, allowed_pending: int = 0) -> None: ...
    def sync_on_stream(self, stream: int, allowed_pending: int = 0) -> None: ...
    @property
    def threads(self) -> int: ...
    @property
    def threads_per_subpool(self) -> list[int]: ...
    @property
    def warnings(self) -> list[str]: ...

class ExpertPipeline:
    def __init__(
        self,
        *,
        image_bytes: int,
        parts: Sequence[tuple[int, int]],
        buffers: int,
        rank: int,
        memory: int,
        counters: int,
        pids: Sequence[int],
    ) -> None: ...
    @property
    def passed(self) -> int: ...
    def run(
        self,
        layer: MoeLayer,
        global_scales: int,
        experts: Sequence[int],
        destinations: int,
        copies: DeviceCopies,
    ) -> None: ...
    def start(
        self, layer: MoeLayer, global_scales: int, experts: Sequence[int], staging: int, copies: DeviceCopies
    ) -> StagedRun: ...

FORMATS: tuple[dict, ...]
GGUF_TYPES: tuple[dict, ...]

class HostCopies(DeviceCopies):
    def __init__(self) -> None: ...

class Linear:
    def __init__(
        self,
        engine: Engine,
        *,
        k: int,
        parts: Sequence[tuple[str, str, int, int, int, float, int, int]],
        activations: str = "auto",
    ) -> None: ...
    @property
    def handle(self) -> int: ...
    @property
    def k(self) -> int: ...
    @property
    def kernels(self) -> list[str]: ...
    @property
    def rows(self) -> int: ...
    @property
    def weight_bytes(self) -> int: ...

METHODS: tuple[str, ...]

class MappedReads:
    def __init__(self, address: int, bytes: int) -> None: ...
    @property
    def cut_off(self) -> bool: ...

class MoeLayer:
    def __init__(
        self,
        engine: Engine,
        *,
        method: str,
        num_experts: int,
        top_k: int,
        hidden: int,
        intermediate: int,
        max_tokens: int,
        layer_idx: int = 0,
        swiglu_limit: float = 0.0,
        swiglu_alpha: float = 0.0,
        activations: str = "auto",
    ) -> None: ...
    def attach_experts(
        self, file: int, *, formats: Sequence[str] = [], group_size: int = 0, scale_dtype: int = 2
    ) -> None: ...
    def borrow_experts(
        self,
        gate: Sequence[tuple[int, int, float]],
        up: Sequence[tuple[int, int, float]],
        down: Sequence[tuple[int, int, float]],
        *,
        formats: Sequence[str],
        biases: Sequence[Sequence[int]] = [],
    ) -> None: ...
    @property
    def expert_uses(self) -> list[int]: ...
    def forward(
        self,
        tokens: int,
        top_k: int,
        hidden_ptr: int,
        hidden_dtype: int,
        ids_ptr: int,
        ids_dtype: int,
        weights_ptr: int,
        output_ptr: int,
        output_dtype: int,
        accumulate: int = 0,
    ) -> None: ...
    def forward_reference(
        self,
        tokens: int,
        top_k: int,
        hidden_ptr: int,
        hidden_dtype: int,
        ids_ptr: int,
        ids_dtype: int,
        weights_ptr: int,
        output_ptr: int,
        output_dtype: int,
        accumulate: int = 0,
    ) -> None: ...
    @property
    def handle(self) -> int: ...
    @property
    def kernels(self) -> dict[str, Any]: ...
    def load_experts(
        self,
        gate: Sequence[tuple[int, int, float]],
        up: Sequence[tuple[int, int, float]],
        down: Sequence[tuple[int, int, float]],
        *,
        formats: Sequence[str] = [],
        group_size: int = 0,
        scale_dtype: int = 2,
        biases: Sequence[Sequence[int]] = [],
    ) -> None: ...
    @property
    def loaded(self) -> bool: ...
    def set_expert_mask(self, arg0: int) -> None: ...
    def share_experts(self, file: int) -> None: ...
    def submit(
        self,
        tokens: int,
        top_k: int,
        hidden_ptr: int,
        hidden_dtype: int,
        ids_ptr: int,
        ids_dtype: int,
        weights_ptr: int,
        output_ptr: int,
        output_dtype: int,
        accumulate: int = 0,
    ) -> None: ...
    def submit_on_stream(
        self,
        stream: int,
        tokens: int,
        top_k: int,
        hidden_ptr: int,
        hidden_dtype: int,
        ids_ptr: int,
        ids_dtype: int,
        weights_ptr: int,
        output_ptr: int,
        output_dtype: int,
        accumulate: int = 0,
        keep_alive: object = None,
        deferred_ids_ptr: int = 0,
        deferred_output_ptr: int = 0,
    ) -> None: ...
    def submit_write_expert(
        self,
        slot: int,
        ranks: int,
        w13_weight_ptrs: Sequence[int],
        w13_scale_ptrs: Sequence[int],
        w2_weight_ptrs: Sequence[int],
        w2_scale_ptrs: Sequence[int],
    ) -> None: ...
    @property
    def weight_bytes(self) -> int: ...
    def write_expert(
        self,
        expert: int,
        ranks: int,
        w13_weight_ptrs: Sequence[int],
        w13_scale_ptrs: Sequence[int],
        w2_weight_ptrs: Sequence[int],
        w2_scale_ptrs: Sequence[int],
    ) -> None: ...

class RankFailure(RuntimeError): ...

class Recording:
    def __init__(self) -> None: ...
    def close(self) -> None: ...
    def open(self) -> None: ...
    def replay(self, begin: int, end: int) -> None: ...
    @property
    def size(self) -> int: ...

class StagedRun:
    def finish(self) -> None: ...
    def next(self) -> int: ...
    def used(self) -> None: ...

class StreamCopies(DeviceCopies):
    def __init__(self, buffers: int) -> None: ...
    def use_streams(self, bus: int, user: int) -> None: ...

def allow_only_cpus(cpus: Sequence[int]) -> None: ...
def arm_fault(point: str, nth: int = 1) -> None: ...
def capture_id(stream: int) -> int | None: ...
def cpu_features() -> dict[str, Any]: ...
def cpu_variants() -> list[Any]: ...
def device_runtime_present() -> bool: ...
def device_signals() -> dict[str, Any]: ...
def dispatch_table() -> list[Any]: ...
def exchange_capture_mode(mode: int) -> int: ...
def fault_points() -> list[str]: ...
def gguf_decode(type: int, source: int, rows: int, columns: int, target: int, dtype: str) -> None: ...
def linear_rows(handle: int) -> int: ...
def measure_limits(engine: Engine, bytes: int = 1073741824, repeats: int = 5) -> dict[str, Any]: ...
def operator_schemas() -> list[str]: ...
def page_lock(address: int, bytes: int) -> int: ...
def quantise_rows(
    dtype: str,
    numbers: int,
    rows: int,
    columns: int,
    blocks: tuple[int, int, int, int] | None,
    bits: int,
    group: int,
    codes: int,
    code_scales: int,
) -> int: ...
def register_operators() -> None: ...
def release_finished() -> None: ...
def set_lora(layer: MoeLayer, *, tensors: Sequence[int] | None, rank: int, scale: float) -> None: ...
def topology() -> dict[str, Any]: ...
def training_backward(
    layer: MoeLayer,
    *,
    tokens: int,
    top_k: int,
    dtype: int,
    hidden: int,
    ids: int,
    weights: int,
    saved: tuple[int, int, int, int],
    output_gradient: int,
    lora: tuple[Sequence[int], int, float, Sequence[int]] | None = None,
    hidden_gradient: int = 0,
    weight_gradient: int = 0,
    lora_gradients: Sequence[int] | None = None,
    base_gradients: Sequence[int] = [],
) -> None: ...
def training_forward(
    layer: MoeLayer,
    *,
    tokens: int,
    top_k: int,
    dtype: int,
    hidden: int,
    ids: int,
    weights: int,
    output: int,
    saved: tuple[int, int, int, int],
    lora: tuple[Sequence[int], int, float, Sequence[int]] | None = None,
) -> None: ...
def unpack_numa_part_int4(packed: int, rows: int, columns: int, out: int, row_bytes: int) -> None: ...
def unpack_numa_part_int8(packed: int, rows: int, columns: int, out: int, row_bytes: int) -> None: ...
def use_operator_engine(engine: Engine) -> None: ...
