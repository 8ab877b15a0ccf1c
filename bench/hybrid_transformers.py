"""The hybrid engine under transformers, end to end, on a random model of Qwen3-MoE's shape.

equality    greedy tokens with all experts on the CPU, some, and all on the device, in float32, against
            plain transformers on the device
graph       decoding one token a step, eagerly and from a captured CUDA graph: same tokens, tokens/s
overlap     one long prompt layer by layer on the device: how much copying runs beside computing
curve       tokens/s of prompts by length, experts split as always and layer by layer: where the
            threshold belongs

python bench/hybrid_transformers.py                           # CUDA, 4.8 GB of experts, 10 GB of disk
python bench/hybrid_transformers.py --part graph --part curve --checkpoint /fast/disk/model
python bench/hybrid_transformers.py --device cpu --small      # the same steps in seconds, without a GPU
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from overlap import overlap_of_trace
from random_moe import LARGE, SMALL, Size, write_checkpoint

from kt_kernel import KTMoEWrapper
from kt_kernel.integrations.transformers import from_pretrained

# Where the reference's best two logits are closer than this, rounding of activations may choose either.
DECIDED_LOGIT_GAP = 0.25
_WARM_STEPS = 3
_REPEATS = 3

Row = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """`lengths`: of the prompts of the curve, in tokens; the last is the one whose overlap is looked at."""

    device: torch.device
    size: Size
    path: Path
    prompt: int
    new_tokens: int
    lengths: tuple[int, ...]
    threads: int | None

    @property
    def some_experts(self) -> int:
        return self.size.experts // 4

    def model(self, dtype: torch.dtype = torch.bfloat16, **options: Any) -> torch.nn.Module:
        """The checkpoint, patched; first, what the caller deleted is freed."""
        gc.collect()
        return from_pretrained(self.path, device=self.device, dtype=dtype, cpuinfer=self.threads, **options)

    def ids(self, tokens: int) -> torch.Tensor:
        """A random prompt [1, tokens], the same every time."""
        generator = torch.Generator().manual_seed(tokens)
        return torch.randint(self.size.vocabulary, (1, tokens), generator=generator).to(self.device)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


# ---- equality ------------------------------------------------------------------------------------


def equality(bench: Bench) -> Iterator[Row]:
    reference = transformers.AutoModelForCausalLM.from_pretrained(bench.path, dtype=torch.float32)
    reference = reference.to(bench.device).eval()
    ids = bench.ids(bench.prompt)
    expected = _greedy(reference, ids, bench.new_tokens)
    for name, count in (("CPU", 0), ("hybrid", bench.some_experts), ("device", bench.size.experts)):
        model = bench.model(torch.float32, num_gpu_experts=count)
        tokens = _greedy(model, ids, bench.new_tokens)
        yield {
            "part": "equality",
            "experts": name,
            "device_experts_per_layer": count,
            "same_tokens": int((tokens == expected).cumprod(0).sum()),
            "tokens": bench.new_tokens,
            **_teacher_forced(model, reference, torch.cat([ids[0], tokens])[None]),
        }
        model.kt.close()
        del model


def _greedy(model: torch.nn.Module, ids: torch.Tensor, tokens: int) -> torch.Tensor:
    """The new tokens [tokens]."""
    with torch.inference_mode():
        result = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
        )
    return result[0, ids.shape[1] :]


@torch.inference_mode()
def _teacher_forced(model: torch.nn.Module, reference: torch.nn.Module, ids: torch.Tensor) -> Row:
    """Both on the same text, so that one rounding difference cannot grow into another continuation."""
    logits, expected = (each(ids).logits[0, :-1].float() for each in (model, reference))
    top = expected.topk(2).values
    decided = top[:, 0] - top[:, 1] > DECIDED_LOGIT_GAP
    agree = (logits.argmax(-1) == expected.argmax(-1))[decided].float().mean()
    given = ids[0, 1:, None]
    deltas = logits.log_softmax(-1).gather(1, given) - expected.log_softmax(-1).gather(1, given)
    return {
        "decided_positions": int(decided.sum()),
        "agreeing": agree.item(),
        "mean_delta_logprob": deltas.abs().mean().item(),
    }


# ---- decoding ------------------------------------------------------------------------------------


def graph(bench: Bench) -> Iterator[Row]:
    for count in (0, bench.some_experts, bench.size.experts):
        model = bench.model(num_gpu_experts=count)
        eager, seconds = _decode(bench, model, _eager_step)
        row = {
            "part": "graph",
            "device_experts_per_layer": count,
            "eager_tokens_per_second": bench.new_tokens / seconds,
        }
        if bench.device.type == "cuda":
            KTMoEWrapper.set_capture_batch_sizes([1])
            replayed, seconds = _decode(bench, model, _graph_step)
            row |= {
                "graph_tokens_per_second": bench.new_tokens / seconds,
                "same_tokens": bool(torch.equal(replayed, eager)),
            }
        yield row
        model.kt.close()
        del model


class _Decoder:
    """One token a step into a cache of fixed addresses; `token` [1, 1] is the input and then the output."""

    def __init__(self, bench: Bench, model: torch.nn.Module) -> None:
        self.model = model
        length = bench.prompt + bench.new_tokens + _WARM_STEPS + 1
        self.cache = transformers.StaticCache(config=model.config, max_cache_len=length)
        logits = model(bench.ids(bench.prompt), past_key_values=self.cache, use_cache=True).logits
        self.token = logits[:, -1:].argmax(-1)

    def step(self) -> None:
        logits = self.model(self.token, past_key_values=self.cache, use_cache=True).logits
        self.token.copy_(logits[:, -1:].argmax(-1))


def _eager_step(decoder: _Decoder) -> Callable[[], None]:
    return decoder.step


def _graph_step(decoder: _Decoder) -> Callable[[], None]:
    captured = torch.cuda.CUDAGraph()
    # The stream of the warm-up: buffers belong to a stream, and cannot be made while capturing.
    with torch.cuda.graph(captured, stream=torch.cuda.current_stream()):
        decoder.step()

    def step() -> None:
        decoder.model.kt.begin_step()
        captured.replay()

    return step


@torch.inference_mode()
def _decode(
    bench: Bench, model: torch.nn.Module, make_step: Callable[[_Decoder], Callable[[], None]]
) -> tuple[torch.Tensor, float]:
    """The tokens [new_tokens] after a few warm ones, and the seconds they took."""
    stream = torch.cuda.Stream() if bench.device.type == "cuda" else None
    with torch.cuda.stream(stream):
        decoder = _Decoder(bench, model)
        for _ in range(_WARM_STEPS):
            decoder.step()
        step = make_step(decoder)
        tokens = torch.empty(bench.new_tokens, dtype=torch.long, device=bench.device)
        bench.synchronize()
        begin = time.perf_counter()
        for place in range(bench.new_tokens):
            step()
            tokens[place : place + 1] = decoder.token[0]
        bench.synchronize()
        return tokens, time.perf_counter() - begin


# ---- long prompts --------------------------------------------------------------------------------


def overlap(bench: Bench) -> Iterator[Row]:
    if bench.device.type != "cuda":
        yield {"part": "overlap", "skipped": "only a GPU copies beside computing"}
        return
    model = bench.model(num_gpu_experts=bench.some_experts, gpu_prefill_token_threshold=1)
    ids = bench.ids(bench.lengths[-1])
    _prefill(model, ids)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        _prefill(model, ids)
        bench.synchronize()
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "trace.json"
        profile.export_chrome_trace(str(file))
        measured = overlap_of_trace(json.loads(file.read_text()))
    yield {"part": "overlap", "tokens": ids.shape[1], **asdict(measured), "share": measured.share}
    model.kt.close()


def curve(bench: Bench) -> Iterator[Row]:
    speeds: dict[str, list[float]] = {}
    for mode, threshold in (("hybrid", 0), ("layerwise", 1)):
        model = bench.model(num_gpu_experts=bench.some_experts, gpu_prefill_token_threshold=threshold)
        speeds[mode] = [length / _prefill_seconds(bench, model, length) for length in bench.lengths]
        model.kt.close()
        del model
    for length, hybrid, layerwise in zip(bench.lengths, speeds["hybrid"], speeds["layerwise"], strict=True):
        yield {
            "part": "curve",
            "tokens": length,
            "hybrid_tokens_per_second": hybrid,
            "layerwise_tokens_per_second": layerwise,
        }


def _prefill_seconds(bench: Bench, model: torch.nn.Module, length: int) -> float:
    """The best of a few, after one to warm up."""
    ids, times = bench.ids(length), []
    for _ in range(1 + _REPEATS):
        bench.synchronize()
        begin = time.perf_counter()
        _prefill(model, ids)
        bench.synchronize()
        times.append(time.perf_counter() - begin)
    return min(times[1:])


@torch.inference_mode()
def _prefill(model: torch.nn.Module, ids: torch.Tensor) -> None:
    model(ids, use_cache=True, logits_to_keep=1)


# ---- the program ---------------------------------------------------------------------------------

PARTS = {"equality": equality, "graph": graph, "overlap": overlap, "curve": curve}


def _text(row: Row) -> str:
    values = [
        f"{name.replace('_', ' ')} {value:.4g}"
        if isinstance(value, float)
        else f"{name.replace('_', ' ')} {value}"
        for name, value in row.items()
        if name != "part"
    ]
    return f"{row['part']:>9}: {', '.join(values)}"


def _bench(arguments: argparse.Namespace, path: Path) -> Bench:
    size = SMALL if arguments.small else LARGE
    device = torch.device(arguments.device)
    begin = time.perf_counter()
    if write_checkpoint(path, size, device):
        print(f"# checkpoint written to {path} in {time.perf_counter() - begin:.0f} s", flush=True)
    gigabytes = size.expert_bytes / 1e9
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"# {gigabytes:.2f} GB of bf16 experts in {size.layers} layers; device: {where}", flush=True)
    return Bench(
        device=device,
        size=size,
        path=path,
        prompt=24 if arguments.small else 512,
        new_tokens=8 if arguments.small else 64,
        lengths=(8, 32) if arguments.small else (256, 512, 1024, 2048, 4096, 8192, 16384),
        threads=arguments.threads,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=PARTS, action="append", help="default: all")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="a model of 12 MB, for trying this program")
    parser.add_argument("--checkpoint", type=Path, help="where the model is kept (default: thrown away)")
    parser.add_argument("--threads", type=int, help="default: one per physical core")
    parser.add_argument("--json", action="store_true", help="one JSON line per result instead of text")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        bench = _bench(arguments, arguments.checkpoint or Path(scratch) / "model")
        for name in arguments.part or PARTS:
            for row in PARTS[name](bench):
                print(json.dumps(row) if arguments.json else _text(row), flush=True)


if __name__ == "__main__":
    main()
