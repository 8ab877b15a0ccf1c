"""KTMoEWrapper: the routed experts of one MoE layer on the CPU, as serving software calls them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch

from kt_kernel import kt_kernel_ext
from kt_kernel.calls.buffers import BUFFERS
from kt_kernel.calls.cpu_path import CpuPath
from kt_kernel.calls.deferral import DeferralChain, chain_of_model, select_deferred_experts
from kt_kernel.calls.device_path import CudaRuntime, DevicePath
from kt_kernel.calls.masks import resolve_gpu_experts_mask
from kt_kernel.checkpoint.save import save_layer
from kt_kernel.checkpoint.sources import open_experts, release_sources
from kt_kernel.cpu_share import CpuShare
from kt_kernel.device_ops.routing import Split
from kt_kernel.engine import get_engine
from kt_kernel.errors import (
    CallOrderError,
    CheckpointError,
    CheckpointPathError,
    FeatureUnavailableError,
    InputError,
    KTError,
)
from kt_kernel.expert_copies import ExpertCopies
from kt_kernel.formats.cut import cut
from kt_kernel.formats.expert_image import ExpertEncoding, ExpertTensors
from kt_kernel.formats.matrices import LayerExperts
from kt_kernel.formats.methods import (
    AUTO,
    METHODS,
    announce_kernels,
    announce_mapped,
    check_activations,
    check_sizes,
    check_weight_storage,
    resolve_method,
)
from kt_kernel.formats.quantize.experts import quantize_experts
from kt_kernel.formats.stored import StoredExperts
from kt_kernel.formats.weight_order import check_expert_tensors, logical_order
from kt_kernel.layer_config import MAPPED, PACKED, ConfiguredLayer, LayerConfig
from kt_kernel.modes import SFT, require_inference
from kt_kernel.threads import plan_threads

DEFAULT_MOST_TOKENS = 8192  # tokens of one call; SGLang cuts prompts into pieces of at most so many, too
_PLAIN_METHOD = "BF16"  # without a checkpoint that has a format of its own


class KTMoEWrapper(ConfiguredLayer):
    """The experts of one layer. Those marked as living on the accelerator are loaded too, but skipped.

    Needed are `layer_idx` (>= 0) and four sizes: `num_experts`, `num_experts_per_tok`, `hidden_size`, and
    `moe_intermediate_size`, the full one, before any split over accelerators. The rest has defaults, which
    None stands for, too:

    - `gpu_experts_mask` (bool [E], or an int, taken as `num_gpu_experts`) or `num_gpu_experts=n` (experts 0
      to n-1): the experts on the accelerator; default: none. The mask is copied; edits in place of the
      attribute `gpu_experts_mask` take effect with the next call.
    - `cpuinfer_threads`: threads in total; default: one per physical core that this process may use.
      `threadpool_count` pools share them; default: one per NUMA node with such cores. `numa_nodes`: the node
      of each pool; default: those nodes in order where the count is not given either, else 0, 1, ...
    - `weight_path`: the checkpoint's directory or GGUF file, for `load_weights`; default: none.
    - `method`: a name of `kt_kernel.formats.methods`, or AUTO for the one that reads the checkpoint at
      `weight_path`; default: AUTO with a `weight_path`, BF16 without. The attribute `method` is the name.
    - `chunked_prefill_size`: the most tokens of one call; default: 8192.
    - `cpu_save`: write what `load_weights_from_tensors` quantises to `weight_path`; default: False.
    - `max_deferred_experts_per_token`: experts of a token that may be added one layer later; default: 0.
    - `mode`: "inference", the default, or "sft": the same with gradients, kt_kernel/training/sft_layer.py,
      for which `training_options` are.
    - `swiglu_limit`: gate and up are clamped to it; default: 0, not clamped. `swiglu_alpha`: the factor in
      the sigmoid; default: 0, the usual SwiGLU.
    - `activations`: what the kernels round their inputs to, "bf16" or "int8"; default: "auto", the faster of
      those that the method has.
    - `weight_storage`: "packed" into memory, the default, or, of GGUF files, "mapped", which computes from
      the file itself, slower and without memory of its own.
    - `share`: the part of every expert that is loaded and computed here, so that results are a part of the
      sum, and experts are copied out as that part (kt_kernel/cpu_share.py); default: everything.

    Raises ConfigurationError, MethodError or, with AUTO, CheckpointError, all ValueErrors.
    """

    def __new__(cls, *arguments: Any, mode: str = "inference", **options: Any) -> Any:
        if mode != SFT:
            return super().__new__(cls)
        from kt_kernel import SftLayer  # of a floor above, which the package fetches for its users

        return SftLayer(*arguments, **options)

    def __init__(
        self,
        layer_idx: int,
        num_experts: int,
        num_experts_per_tok: int,
        hidden_size: int,
        moe_intermediate_size: int,
        gpu_experts_mask: torch.Tensor | int | None = None,
        cpuinfer_threads: int | None = None,
        threadpool_count: int | None = None,
        weight_path: str | os.PathLike | None = None,
        chunked_prefill_size: int | None = None,
        cpu_save: bool = False,
        max_deferred_experts_per_token: int | None = None,
        method: str | None = None,
        numa_nodes: Sequence[int] | None = None,
        mode: str = "inference",
        num_gpu_experts: int | None = None,
        *,
        swiglu_limit: float = 0.0,
        swiglu_alpha: float = 0.0,
        activations: str = "auto",
        weight_storage: str = PACKED,
        share: CpuShare | None = None,
        **training_options: Any,
    ) -> None:
        require_inference(mode, training_options)
        method_row = resolve_method(method or (AUTO if weight_path else _PLAIN_METHOD), weight_path)
        self.method = method_row.name
        if cpu_save and (method_row.quantise is None or not method_row.storage or not weight_path):
            raise FeatureUnavailableError(
                f"cpu_save is not available for method {self.method} with weight_path {weight_path!r}: it "
                "saves experts that are quantised here into that directory; leave it out."
            )
        self._cpu_save = cpu_save
        self._config = LayerConfig(
            layer_idx=layer_idx,
            num_experts=num_experts,
            num_experts_per_tok=num_experts_per_tok,
            hidden_size=hidden_size,
            moe_intermediate_size=moe_intermediate_size,
            chunked_prefill_size=(
                DEFAULT_MOST_TOKENS if chunked_prefill_size is None else chunked_prefill_size
            ),
            max_deferred_experts_per_token=max_deferred_experts_per_token or 0,
            swiglu_limit=swiglu_limit,
            swiglu_alpha=swiglu_alpha,
            activations=activations,
            weight_storage=weight_storage,
            share=share,
        )
        check_activations(method_row, activations)
        check_weight_storage(method_row, weight_storage, activations)
        check_sizes(
            method_row, hidden_size=self.hidden_size, moe_intermediate_size=self.moe_intermediate_size
        )
        if isinstance(gpu_experts_mask, int):
            gpu_experts_mask, num_gpu_experts = None, gpu_experts_mask
        self._gpu_experts_mask = resolve_gpu_experts_mask(num_experts, gpu_experts_mask, num_gpu_experts)
        self.weight_path = None if weight_path is None else os.fspath(weight_path)
        self.cpu_infer = _engine(cpuinfer_threads, threadpool_count, numa_nodes)
        self.moe: kt_kernel_ext.MoeLayer | None = None
        self._chain = chain_of_model(self.cpu_infer, hidden_size, self.weight_path)
        self._chain.join(self, self._config.layer_idx)
        self._cpu: CpuPath | None = None
        self._device: DevicePath | None = None
        self._copies: ExpertCopies | None = None
        self._mapped: LayerExperts | None = None  # what the kernels read where the file is mapped
        self._has_cpu_experts: bool | None = None

    # ---- what other code reads ---------------------------------------------------------------

    @property
    def gpu_experts_mask(self) -> torch.Tensor:
        """bool [E] on the CPU, True = the CPU skips the expert; the kernels read this very tensor."""
        return self._gpu_experts_mask

    @property
    def num_gpu_experts(self) -> int:
        """How many experts the mask puts on the accelerator now."""
        return int(self._gpu_experts_mask.sum())

    @property
    def has_cpu_experts(self) -> bool:
        """May any expert of this layer be computed here? The layer before defers only if so.

        By default what `gpu_experts_mask` says; set it where `device_experts` of the calls decides.
        """
        if self._has_cpu_experts is None:
            return not bool(self._gpu_experts_mask.all())
        return self._has_cpu_experts

    @has_cpu_experts.setter
    def has_cpu_experts(self, value: bool) -> None:
        self._has_cpu_experts = value

    # ---- loading -----------------------------------------------------------------------------

    def load_weights(self, physical_to_logical_map_cpu: torch.Tensor | None = None) -> None:
        """Load this layer from `weight_path`; returns when it can be called.

        `physical_to_logical_map_cpu`: integers [E], entry p = checkpoint id of the expert in slot p; None =
        the same order. Raises CheckpointError (also for a missing path, file or tensor), naming the file.
        """
        order = logical_order(physical_to_logical_map_cpu, self.num_experts)
        if self.weight_path is None:
            raise CheckpointPathError(
                f"layer {self.layer_idx}: weight_path is not given; name the checkpoint's directory."
            )
        source = open_experts(self.weight_path, self.method)
        sizes = {
            "num_experts": self.num_experts,
            "hidden": self.hidden_size,
            "intermediate": self.moe_intermediate_size,
        }
        if self._config.weight_storage == MAPPED:
            self._mapped = source.views(self.layer_idx, self.method, **sizes)
            self._load(self._mapped, order, CheckpointError)
            return
        with source.layer(self.layer_idx, self.method, **sizes) as experts:
            self._load(experts, order, CheckpointError)

    def load_weights_from_tensors(
        self,
        gate_proj: torch.Tensor,
        up_proj: torch.Tensor,
        down_proj: torch.Tensor,
        physical_to_logical_map_cpu: torch.Tensor | None = None,
    ) -> None:
        """Load from CPU tensors by logical id: gate, up [E, I, H] and down [E, H, I]; none is kept.

        They are bf16, f16 or f32 (method BF16: bf16 only), and quantised, in one rounding, to what a
        checkpoint for the method would hold (`kt_kernel.formats.quantize`). With `cpu_save` that is also
        written to `weight_path`, one file for each layer, for `load_weights` of a later run.
        """
        if self._config.weight_storage == MAPPED:
            raise FeatureUnavailableError(
                f"layer {self.layer_idx}: weights given as tensors cannot be mapped from a file; leave "
                "weight_storage out."
            )
        order = logical_order(physical_to_logical_map_cpu, self.num_experts)
        matrices = check_expert_tensors(self._config, METHODS[self.method], gate_proj, up_proj, down_proj)
        experts = quantize_experts(self.method, *matrices)
        if self._cpu_save:
            save_layer(self.weight_path, self.layer_idx, METHODS[self.method], experts)
        self._load(experts, order, InputError)

    def share_weights(self, file: int) -> StoredExperts:
        """Move the loaded weights into `file`, an open descriptor of memory, for `attach_weights` elsewhere.

        Raises CallOrderError before they are loaded, InputError for weights that are mapped from a file.
        """
        copies = self._loaded_copies
        try:
            self.moe.share_experts(file)
        except ValueError as error:
            raise InputError(f"layer {self.layer_idx}: {error}") from None
        return copies.stored

    def attach_weights(self, file: int, stored: StoredExperts) -> None:
        """Compute with what `share_weights` of a process with equal arguments wrote to `file` and returned.

        Raises InputError if the file holds experts of another size.
        """
        native = self._new_native()
        try:
            native.attach_experts(file, **stored.attach_arguments())
        except ValueError as error:
            raise InputError(f"layer {self.layer_idx}: {error}") from None
        self._serve(native, stored)

    def _load(self, experts: LayerExperts, order: list[int], error_type: type[KTError]) -> None:
        config = self._config
        experts = cut(experts, self.method, config.part)
        native = self._new_native()
        try:
            experts.hand_over(native, order, config.weight_storage)
        except ValueError as error:
            damaged = experts.with_undefined_scale()
            where = f" (scales of '{damaged[0]}')" if damaged else ""
            raise error_type(f"layer {self.layer_idx}: {error}{where}") from None
        if config.weight_storage == MAPPED:
            announce_mapped(self.method, native.kernels["experts"])
        else:
            announce_kernels(self.method, experts.formats or (self.method,), config.activations)
        self._serve(native, StoredExperts.of(experts, order))

    def _new_native(self) -> kt_kernel_ext.MoeLayer:
        config = self._config
        native = kt_kernel_ext.MoeLayer(
            self.cpu_infer,
            method=self.method,
            num_experts=config.num_experts,
            top_k=config.num_experts_per_tok,
            hidden=config.hidden_size,
            intermediate=config.part.size,
            max_tokens=config.chunked_prefill_size,
            layer_idx=config.layer_idx,
            swiglu_limit=config.swiglu_limit,
            swiglu_alpha=config.swiglu_alpha,
            activations=config.activations,
        )
        native.set_expert_mask(self._gpu_experts_mask.data_ptr())
        return native

    def _serve(self, native: kt_kernel_ext.MoeLayer, stored: StoredExperts) -> None:
        self.moe = native
        self._copies = ExpertCopies(self.method, self._config, native, stored)
        reads = (self._gpu_experts_mask, self._mapped)
        shared = (self._config, self.cpu_infer, self._chain, native, reads)
        self._cpu = CpuPath(*shared)
        self._device = DevicePath(*shared, BUFFERS, CudaRuntime())

    # ---- calls -------------------------------------------------------------------------------

    def forward(
        self,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        cuda_stream: int | None = None,
        *,
        device_experts: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The weighted sum of each token's CPU experts: a new tensor [tokens, H] like `hidden_states`.

        `hidden_states` [..., H] bf16, f16 or f32; `topk_ids` [tokens, k] of any integer type, -1 = skip;
        `topk_weights` [tokens, k]. All on the CPU, or all on an accelerator, whose raw stream handle is
        `cuda_stream` (default: the current stream). `device_experts`, bool [E+1] where the ids are, last
        entry False: experts that this call skips besides those of `gpu_experts_mask`; they take part in the
        ranking of deferral. Raises InputError, or CallOrderError before the weights are loaded.
        """
        if self._cpu is None:
            raise self._not_loaded()
        if hidden_states.is_cpu:
            return self._cpu.forward(hidden_states, topk_ids, topk_weights, device_experts)
        return self._on_device(hidden_states).forward(
            hidden_states, topk_ids, topk_weights, cuda_stream, Split(on_device=device_experts)
        )

    def submit_forward(
        self,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        cuda_stream: int | None = None,
        *,
        device_experts: torch.Tensor | None = None,
    ) -> None:
        """Start `forward` and return; until `sync_forward`, `hidden_states` on the CPU must not change."""
        if self._cpu is None:
            raise self._not_loaded()
        if hidden_states.is_cpu:
            self._cpu.submit(hidden_states, topk_ids, topk_weights, device_experts)
        else:
            self._on_device(hidden_states).submit(
                hidden_states, topk_ids, topk_weights, cuda_stream, Split(on_device=device_experts)
            )

    def sync_forward(self, hidden_states: torch.Tensor, cuda_stream: int | None = None) -> torch.Tensor:
        """The result of `submit_forward`; an accelerator fills it in stream order, without waiting here."""
        if self._cpu is None:
            raise self._not_loaded()
        if hidden_states.is_cpu:
            return self._cpu.sync(hidden_states)
        return self._on_device(hidden_states).sync(hidden_states, cuda_stream)

    def forward_split(
        self, hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, split: Split
    ) -> torch.Tensor:
        """`forward` on the current stream, counting the uses and scaling the weights as `split` says."""
        if self._cpu is None:
            raise self._not_loaded()
        if hidden_states.is_cpu:
            split.count(topk_ids)
            weights = split.weights_for_cpu(topk_weights)
            return self._cpu.forward(hidden_states, topk_ids, weights, split.on_device)
        return self._on_device(hidden_states).forward(hidden_states, topk_ids, topk_weights, None, split)

    def submit_split(
        self, hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, split: Split
    ) -> torch.Tensor | None:
        """Start `forward_split`, for `sync_forward` to end; returns the slots of the accelerator's part.

        In the shape and dtype of the ids; None if `split` has no table of slots.
        """
        if self._cpu is None:
            raise self._not_loaded()
        if hidden_states.is_cpu:
            split.count(topk_ids)
            self._cpu.submit(hidden_states, topk_ids, split.weights_for_cpu(topk_weights), split.on_device)
            return split.slots(topk_ids)
        return self._on_device(hidden_states).submit(hidden_states, topk_ids, topk_weights, None, split)

    def take_deferred(
        self, hidden_states: torch.Tensor, cuda_stream: int | None = None
    ) -> torch.Tensor | None:
        """What the layer before deferred, for a caller that does not run this layer's CPU experts.

        [tokens, H] like `hidden_states`, to be added to this layer's output; None if there is nothing.
        """
        if self._cpu is None:
            raise self._not_loaded()
        if hidden_states.is_cpu:
            return self._cpu.take_deferred(hidden_states)
        return self._on_device(hidden_states).take_deferred(hidden_states, cuda_stream)

    def join_chain(self, chain: DeferralChain) -> None:
        """Defer to the layers of `chain`, and add what they deferred: they are one model in one process."""
        self._chain.leave(self, self.layer_idx)
        self._chain = chain
        chain.join(self, self.layer_idx)
        for path in (self._cpu, self._device):
            if path is not None:
                path.chain = chain

    def select_deferred_experts(
        self, expert_ids: torch.Tensor, expert_scores: torch.Tensor, protected_k: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(immediate, deferred) ids, see `kt_kernel.calls.deferral.select_deferred_experts`."""
        return select_deferred_experts(expert_ids, expert_scores, protected_k, self.num_experts)

    # ---- copying experts out -----------------------------------------------------------------

    def submit_write_weight_scale_to_buffer(
        self,
        gpu_tp_count: int,
        expert_id: int,
        w13_weight_ptrs: Sequence[int],
        w13_scale_ptrs: Sequence[int],
        w2_weight_ptrs: Sequence[int],
        w2_scale_ptrs: Sequence[int],
    ) -> None:
        """Start writing one expert in its checkpoint's encoding, cut for `gpu_tp_count` devices.

        `expert_id` is the physical slot. Each list holds one host address per device, already of the place
        where the expert goes: rows of gate, then of up, and the matching columns of down (doc/formats.md says
        which dtypes). Runs behind the calls queued before; `sync_write_weight_scale_to_buffer` waits for it.
        Raises InputError if the expert cannot be cut into that many parts, FeatureUnavailableError if experts
        have biases.
        """
        lists = (w13_weight_ptrs, w13_scale_ptrs, w2_weight_ptrs, w2_scale_ptrs)
        self._loaded_copies.submit(expert_id, gpu_tp_count, lists)

    def sync_write_weight_scale_to_buffer(self) -> None:
        """Wait until everything queued on the engine is done; its errors are raised here."""
        self.cpu_infer.sync(0)

    def encoding(self, ranks: int) -> ExpertEncoding:
        """How `write_expert` writes this layer's experts for `ranks` devices.

        Raises ConfigurationError if they cannot be cut so, FeatureUnavailableError if they have biases,
        CallOrderError before the weights are loaded.
        """
        return self._loaded_copies.encoding(ranks)

    def encoding_of_matrices(self, ranks: int) -> ExpertEncoding:
        """`encoding` of experts that may have biases, which it leaves out (`biases`)."""
        return self._loaded_copies.encoding_of_matrices(ranks)

    def biases(self, expert_id: int) -> tuple[torch.Tensor | None, ...]:
        """Of gate, up and down of one expert (physical slot), float32 [rows]; None where there is none.

        Raises CallOrderError before the weights are loaded.
        """
        return self._loaded_copies.biases_of(expert_id)

    @property
    def global_scales(self) -> torch.Tensor:
        """float32 [E, 3] by physical slot: factors of all values of gate, up and down; 1 for most methods.

        Raises CallOrderError before the weights are loaded.
        """
        return self._loaded_copies.stored.global_scales

    def write_expert(self, expert_id: int, shards: Sequence[ExpertTensors]) -> None:
        """Write one expert (physical slot), a shard per rank, into tensors of `encoding(len(shards))`.

        At once, on any thread, beside calls that are queued or running: it shares neither their order nor
        their errors. Raises InputError.
        """
        self._loaded_copies.write(expert_id, shards)

    @property
    def _loaded_copies(self) -> ExpertCopies:
        if self._copies is None:
            raise self._not_loaded()
        return self._copies

    # ---- process-wide caches -----------------------------------------------------------------

    @staticmethod
    def set_capture_batch_sizes(capture_bs: Sequence[int]) -> None:
        """Token counts of the graphs to be captured: each gets host buffers of its own."""
        BUFFERS.set_capture_sizes(capture_bs)

    @staticmethod
    def get_capture_batch_sizes() -> list[int]:
        """The token counts given to `set_capture_batch_sizes`."""
        return BUFFERS.capture_sizes

    @staticmethod
    def clear_buffer_cache() -> None:
        """Free the host buffers that nothing needs: calls on their way, and graphs, keep theirs."""
        BUFFERS.clear()

    @staticmethod
    def force_release_loader() -> None:
        """Close the checkpoint files kept open between layers."""
        release_sources()

    def _on_device(self, hidden_states: torch.Tensor) -> DevicePath:
        if not hidden_states.is_cuda:
            raise InputError(
                f"layer {self.layer_idx}: hidden_states is on {hidden_states.device}, expected cpu or cuda."
            )
        return self._device

    def _not_loaded(self) -> CallOrderError:
        return CallOrderError(f"layer {self.layer_idx}: the weights are not loaded; call load_weights first.")


def _thread_argument(option: str) -> str:
    """How the constructor spells what `plan_threads` calls `option`."""
    return "cpuinfer_threads" if option == "cpuinfer" else option


def _engine(threads: int | None, pools: int | None, numa_nodes: Sequence[int] | None) -> kt_kernel_ext.Engine:
    """The process's engine with these threads; the machine's own numbers where nothing is said."""
    if threads is None or pools is None:
        plan = plan_threads(kt_kernel_ext.topology(), threads, pools, numa_nodes, _thread_argument)
        threads, pools, numa_nodes = plan.threads, plan.pools, plan.numa_nodes
    return get_engine(threads, pools, numa_nodes)
