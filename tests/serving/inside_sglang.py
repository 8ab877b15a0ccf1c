"""Runs in an interpreter of its own, with SGLang: its expert weights as slots of the hybrid engine, and what
becomes of failures that a GPU reports late.

Arguments: a model's folder, a free port. Standard output: one JSON line per check, its name and what went
wrong (null = nothing).
"""

import json
import sys
import traceback
from contextlib import nullcontext
from types import SimpleNamespace

import torch
from sglang.srt.arg_groups.overrides import resolving_view
from sglang.srt.layers.moe.moe_runner import MoeRunnerConfig
from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod
from sglang.srt.model_executor import cuda_graph_config, forward_batch_info
from sglang.srt.model_executor.runner import decode_cuda_graph_runner
from sglang.srt.plugins import load_plugins
from sglang.srt.server_args import prepare_server_args

from kt_kernel.errors import CheckpointError, FeatureUnavailableError
from kt_kernel.formats.decoding import decode_expert
from kt_kernel.formats.expert_image import ExpertEncoding
from kt_kernel.hybrid.slots import Placement
from kt_kernel.hybrid.torch_experts import TorchDeviceExperts

load_plugins()

# After SGLang's plug-ins, which change what these import.
from kt_kernel.integrations.sglang import device_experts, moe_method, serving_hooks, slot_formats  # noqa: E402

MODEL, PORT = sys.argv[1:]
HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 256, 128, 6, 3


class OtherMethod:
    """A method whose weights nobody can fill."""

    def get_moe_runner_backend(self, layer):
        return None


def encoding(method="BF16"):
    return ExpertEncoding(method, 1, HIDDEN, INTERMEDIATE)


def image(method):
    """Random bytes that are numbers in every part."""
    torch.manual_seed(0)
    tensors = encoding(method).views(torch.zeros(encoding(method).bytes, dtype=torch.uint8))
    tensors.w13_weight.copy_(torch.randn(tensors.w13_weight.shape).mul(0.1).to(tensors.w13_weight.dtype))
    tensors.w2_weight.copy_(torch.randn(tensors.w2_weight.shape).mul(0.1).to(tensors.w2_weight.dtype))
    for scale in (tensors.w13_scale, tensors.w2_scale):
        if scale is not None:
            scale.copy_(torch.rand(scale.shape) + 0.5)
    return tensors


def layer_of(method, slots, dtype=torch.float32):
    layer = torch.nn.Module()
    layer.moe_runner_config = MoeRunnerConfig(
        num_experts=EXPERTS,
        num_local_experts=slots,
        hidden_size=HIDDEN,
        intermediate_size_per_partition=INTERMEDIATE,
        top_k=TOP_K,
        params_dtype=dtype,
        layer=layer,
    )
    layer.num_experts = EXPERTS
    layer.num_local_experts = slots
    layer.should_fuse_routed_scaling_factor_in_topk = False
    method.create_weights(
        layer=layer,
        num_experts=slots,
        hidden_size=HIDDEN,
        intermediate_size_per_partition=INTERMEDIATE,
        params_dtype=dtype,
        weight_loader=None,
    )
    method.create_moe_runner(layer, layer.moe_runner_config)
    return layer


def check_one_tensor_of_all_experts_is_loaded_into_the_slots():
    placement = Placement.initial(torch.tensor([False, True, False, False, True, True]))
    layer = SimpleNamespace(weight_loader_fused=lambda param, weights, name, shard: param.data.copy_(weights))
    loader = moe_method._SlotLoader(layer, placement, None)
    weights = torch.randn(EXPERTS, 4, 5)
    param = torch.nn.Parameter(torch.empty(3, 4, 5), requires_grad=False)
    loader(param, weights, "experts.w2_weight", "w2")
    assert torch.equal(param.data, weights[[1, 4, 5]])
    try:
        loader(param, weights[:2], "experts.w2_weight", "w2")
    except CheckpointError as error:
        assert "but the layer has 6 experts" in str(error)
    else:
        raise AssertionError("two experts were taken for six")


def check_no_device_experts_load_nothing_of_one_tensor():
    placement = Placement.initial(torch.zeros(EXPERTS, dtype=torch.bool))
    moe_method._SlotLoader(SimpleNamespace(), placement, None)(None, torch.randn(EXPERTS, 4), "w", "w13")


def check_stored_experts_are_decoded():
    for method in ("BF16", "FP8", "MXFP8", "MXFP4"):
        unquantised = UnquantizedFusedMoEMethod()
        layer = layer_of(unquantised, 2)
        form = slot_formats.slot_format(layer, unquantised, encoding(method))
        experts = device_experts.SglangExperts(layer, unquantised, 2, form)
        tensors = image(method)
        assert experts.store(1, tensors) == sum(part.nbytes for part in tensors if part is not None)
        w13, w2 = decode_expert(tensors, encoding(method), torch.float32)
        assert torch.equal(layer.w13_weight[1], w13) and torch.equal(layer.w2_weight[1], w2), method
        assert experts.bytes_per_expert == 3 * HIDDEN * INTERMEDIATE * 4


def check_alternating_rows_where_the_kernels_want_them():
    method = UnquantizedFusedMoEMethod()
    layer = layer_of(method, 1)
    method.w13_swiglu_interleaved = True
    form = slot_formats.slot_format(layer, method, encoding())
    device_experts.SglangExperts(layer, method, 1, form).store(0, image("BF16"))
    w13, _ = decode_expert(image("BF16"), encoding(), torch.float32)
    assert torch.equal(layer.w13_weight[0][0::2], w13[:INTERMEDIATE])
    assert torch.equal(layer.w13_weight[0][1::2], w13[INTERMEDIATE:])


def check_block_fp8_is_stored_byte_by_byte():
    shapes = {
        "w13_weight": ((2, 2 * INTERMEDIATE, HIDDEN), torch.float8_e4m3fn),
        "w13_weight_scale_inv": ((2, 2 * INTERMEDIATE // 128, HIDDEN // 128), torch.float32),
        "w2_weight": ((2, HIDDEN, INTERMEDIATE), torch.float8_e4m3fn),
        "w2_weight_scale_inv": ((2, HIDDEN // 128, INTERMEDIATE // 128), torch.float32),
    }
    layers = [torch.nn.Module() for _ in range(2)]
    for layer in layers:
        for name, (shape, dtype) in shapes.items():
            layer.register_parameter(name, torch.nn.Parameter(torch.zeros(shape).to(dtype), False))
    form = slot_formats.AsStored(encoding("FP8"), tuple(shapes))
    one, other = (device_experts.SglangExperts(layer, None, 2, form) for layer in layers)
    tensors = image("FP8")
    one.store(1, tensors)
    assert other.takes_slots_of(one)
    other.copy_slot(0, one, 1)
    parts = (tensors.w13_weight, tensors.w13_scale, tensors.w2_weight, tensors.w2_scale)
    for name, part in zip(shapes, parts, strict=True):
        for layer, slot in ((layers[0], 1), (layers[1], 0)):
            assert torch.equal(getattr(layer, name)[slot].float(), part.float()), name


def check_spare_slots_are_of_the_layers_kind_and_compute_the_same():
    method = UnquantizedFusedMoEMethod()
    layer = layer_of(method, 2)
    spare = device_experts.spare_experts(layer, method, EXPERTS, encoding())
    assert spare.capacity == EXPERTS and spare.layer.w13_weight.shape[0] == EXPERTS
    assert layer.w13_weight.shape[0] == 2 and layer.moe_runner_config.num_local_experts == 2
    form = slot_formats.slot_format(layer, method, encoding())
    resident = device_experts.SglangExperts(layer, method, 2, form)
    assert spare.takes_slots_of(resident)
    resident.store(0, image("BF16"))
    spare.copy_slot(4, resident, 0)
    expected = TorchDeviceExperts(EXPERTS, HIDDEN, INTERMEDIATE, torch.float32, "cpu", encoding())
    expected.store(4, image("BF16"))
    hidden = torch.randn(5, HIDDEN).bfloat16().float()
    before = hidden.clone()
    slots = torch.full((5, TOP_K), -1, dtype=torch.int32)
    slots[1:4, 2] = 4
    weights = torch.rand(5, TOP_K)
    found = spare.compute(hidden, slots, weights)
    exact = expected.compute(hidden, slots, weights)
    # A CPU that plays the device rounds what it multiplies to bfloat16, as the CPU's experts do.
    error = (found - exact).square().sum() / exact.square().sum()
    assert error < 1e-5, error
    assert torch.equal(hidden, before) and not found[0].any()
    assert spare.compute(hidden[:0], slots[:0], weights[:0]).shape == (0, HIDDEN)


def check_spare_slots_are_unquantised_where_the_layer_cannot_be_filled():
    layer = layer_of(UnquantizedFusedMoEMethod(), 2)
    layer.should_fuse_routed_scaling_factor_in_topk = True
    layer.moe_runner_config.routed_scaling_factor = 2.5
    other = OtherMethod()
    assert slot_formats.slot_format(layer, other, encoding("RAWINT4")) is None
    spare = device_experts.spare_experts(layer, other, EXPERTS, encoding("FP8"))
    assert isinstance(spare.filled_as, slot_formats.Unquantised)
    assert spare.layer.moe_runner_config.routed_scaling_factor is None
    assert layer.moe_runner_config.routed_scaling_factor == 2.5
    assert not spare.takes_slots_of(device_experts.SglangExperts(layer, other, 2, None))
    spare.store(3, image("FP8"))
    w13, _ = decode_expert(image("FP8"), encoding("FP8"), torch.float32)
    assert torch.equal(spare.layer.w13_weight[3], w13)


def check_gaps_in_the_routing_become_weights_of_zero():
    slots = torch.tensor([[2, -1], [-1, -1]], dtype=torch.int32)
    weights = torch.tensor([[0.25, 0.75], [0.5, 0.5]])
    found_slots, found_weights = device_experts.without_gaps(slots, weights)
    assert found_slots.tolist() == [[2, 0], [0, 0]] and found_slots.dtype == torch.int32
    assert found_weights.tolist() == [[0.25, 0], [0, 0]] and found_weights.dtype == torch.float32
    assert slots.min() == -1 and weights.min() > 0


def check_padding_is_counted_on_a_gpu_only():
    serving_hooks.served_models = lambda: (SimpleNamespace(is_asynchronous=True),)
    for module in (forward_batch_info, decode_cuda_graph_runner):
        assert module.enable_num_token_non_padded() is True, module
    serving_hooks.served_models = lambda: (SimpleNamespace(is_asynchronous=False),)
    assert serving_hooks.counts_padding(lambda: False) is False


class Request:
    """As much of SGLang's as a failure touches."""

    def __init__(self):
        self.discard_output_reason = self.to_finish = None
        self.skip_radix_cache_insert = False

    def finished(self):
        return False

    @property
    def failed(self):
        return self.to_finish is not None and self.skip_radix_cache_insert


class LateFailures:
    """A served model on a GPU whose failures are noticed at these calls."""

    is_asynchronous, is_a_stage = True, False

    def __init__(self, *failures):
        self.failures = list(failures)

    def take_failure(self):
        return self.failures.pop(0)

    def batch(self, batch, chunk):
        return nullcontext()


def scheduler_of(served, *started):
    serving_hooks.served_models = lambda: (served,)
    return SimpleNamespace(
        chunked_req=None,
        chunked_prefill_size=None,
        _pending_chunked_abort_req=None,
        result_queue=[(batch, None) for batch in started],
        device_module=SimpleNamespace(synchronize=lambda: None),
    )


def batch_of(*requests):
    return SimpleNamespace(reqs=list(requests), forward_mode=SimpleNamespace(is_extend=lambda: False))


def check_a_model_that_never_asks_for_cpu_experts_is_refused():
    served = [SimpleNamespace(settings=SimpleNamespace(for_draft_model=True), hybrid=None)]
    arguments = SimpleNamespace(model_path="some/model", pp_size=1, _kt_settings=object())
    original, serving_hooks.served_models = serving_hooks.served_models, lambda: served
    try:
        serving_hooks.begin_serving(SimpleNamespace(server_args=arguments))
    except FeatureUnavailableError as error:
        assert "some/model" in str(error), error
    else:
        raise AssertionError("a server without CPU experts began to serve")
    finally:
        serving_hooks.served_models = original


def check_a_late_failure_ends_what_was_started_meanwhile_and_nothing_later():
    done, started, later = batch_of(Request()), batch_of(Request(), Request()), batch_of(Request())
    scheduler = scheduler_of(LateFailures("broken", None), started)
    result = SimpleNamespace(copy_done=None)
    serving_hooks.process_batch_result(scheduler, done, result)
    assert all(request.failed for request in (*done.reqs, *started.reqs))
    assert done.reqs[0].to_finish.to_json()["message"] == "broken"
    assert done.reqs[0].to_finish.to_json()["status_code"] == 500
    serving_hooks.process_batch_result(scheduler, later, result)
    assert not later.reqs[0].failed


def check_a_gpu_is_waited_for_between_the_chunks_of_a_prompt_only():
    waited = []
    scheduler = scheduler_of(LateFailures("broken"))
    scheduler.device_module.synchronize = lambda: waited.append(True)
    plain, chunk = batch_of(Request()), batch_of(Request())
    run = lambda scheduler, batch: "result"  # noqa: E731
    assert serving_hooks.run_batch(run, scheduler, plain) == "result"
    assert not waited and not plain.reqs[0].failed
    scheduler.chunked_req = chunk.reqs[0]
    serving_hooks.run_batch(run, scheduler, chunk)
    assert waited and chunk.reqs[0].failed
    assert scheduler._pending_chunked_abort_req is chunk.reqs[0]


def check_prompts_are_not_captured_where_sglang_would_by_default():
    """As on CUDA; without CPU experts nothing changes."""
    cuda_graph_config.default_prefill_backend = lambda: cuda_graph_config.Backend.BREAKABLE
    backends = []
    for kt in ([], ["--kt-weight-path", MODEL]):
        server_args = prepare_server_args(["--model", MODEL, "--port", PORT, *kt])
        server_args.resolve_once()
        backends.append(resolving_view(server_args).cuda_graph_config.prefill.backend)
    assert backends == ["breakable", "disabled"]


for name, check in list(globals().items()):
    if name.startswith("check_"):
        try:
            check()
            wrong = None
        except Exception:
            wrong = traceback.format_exc()
        print(json.dumps([name, wrong]), flush=True)
