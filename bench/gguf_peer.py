"""The experts of a GGUF file here and in ik_llama.cpp: the same file, the same calls, in the same run.

ik_llama.cpp runs the model (bench/ik_llama.py says how to get it) and is stopped around each layer's experts
(bench/ik_llama_model.py), so its figure is the experts alone: no attention, no routing, no sampling. What
those experts were given, tokens, choice and weights, is given to our layer of the same file, which has as
many threads; the two alternate, rounds of passes each, and neither sees the other's weights in a cache. A
figure is the median over passes and layers, a ratio theirs / ours, with its range over the rounds: above 1
we are faster. "nmse" compares the two outputs, the worst pass counts; both round activations to 8 bits, each
in its own way, so it is below 1e-3.

The peer runs twice, from memory of its own: with weights as stored, and rearranged while loading (its -rtr);
the faster counts. Its wheel is built for AVX2, whatever the CPU has: with KT_KERNEL_CPU_VARIANT=avx2 we are
held to the same instructions. Context is kept short, as attention is not compared.

    python bench/gguf_peer.py model-Q4_K_M.gguf other.gguf --threads 2
    python bench/gguf_peer.py --make Q4_K_M --make Q8_0 --layers 3 --directory /tmp/files   # makes its files
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from ik_llama_model import LayerPass, Peer

from kt_kernel import KTMoEWrapper, __cpu_variant__, kt_kernel_ext
from kt_kernel.bench.limits import Limits, describe_limits, measure_limits, median_limits
from kt_kernel.gguf.model import GgufModel, open_gguf

# Threads of either side spin for some milliseconds after their work and would share the other's cores.
_SETTLE_SECONDS = 0.02
_ROUNDS = 5
_PASSES_OF_ONE_TOKEN = 16


_OURS = "ours"


@dataclass
class Rounds:
    """What the rounds of one token count gave: seconds by whose they are, and by round."""

    seconds: dict[str, list[list[float]]] = field(default_factory=dict)
    limits: list[Limits] = field(default_factory=list)
    distinct_experts: list[int] = field(default_factory=list)
    nmse: float = 0.0


@dataclass(frozen=True)
class Row:
    """Milliseconds of one layer's experts; ratios are theirs / ours, over all passes and by round."""

    file: str
    types: str
    tokens: int
    threads: int
    passes: int
    ours_ms: float
    peer_ms: float
    peer_rearranged_ms: float
    ratio: float
    ratio_range: tuple[float, float]
    nmse: float
    gigabytes_per_second: float
    share_of_read: float
    variant: str
    limits: Limits


class OurLayers:
    """The file's layers as the product loads them; `expert_bytes` of one expert of each, in the file."""

    def __init__(self, path: Path, threads: int, most_tokens: int, activations: str) -> None:
        self.file = open_gguf(path)
        self.layers = [self._layer(path, i, threads, most_tokens, activations) for i in self._indices()]
        for layer in self.layers:
            layer.load_weights(torch.arange(layer.num_experts))

    def _indices(self) -> range:
        return range(self._key("block_count"))

    def _key(self, name: str) -> int:
        return self.file.metadata[f"{self.file.architecture}.{name}"]

    def _layer(
        self, path: Path, index: int, threads: int, most_tokens: int, activations: str
    ) -> KTMoEWrapper:
        _, intermediate, hidden = self.file.info(f"blk.{index}.ffn_gate_exps.weight").shape
        return KTMoEWrapper(
            layer_idx=index,
            num_experts=self._key("expert_count"),
            num_experts_per_tok=self._key("expert_used_count"),
            hidden_size=hidden,
            moe_intermediate_size=intermediate,
            cpuinfer_threads=threads,
            threadpool_count=1,
            weight_path=str(path),
            chunked_prefill_size=most_tokens,
            method="LLAMAFILE",
            activations=activations,
        )

    def run(self, passes: Sequence[LayerPass]) -> tuple[list[float], list[torch.Tensor]]:
        """Seconds and outputs of the layers on the peer's calls; `passes` go through the layers in turn."""
        seconds, outputs = [], []
        for place, given in enumerate(passes):
            layer, call = self.layers[place % len(self.layers)], given.call
            begin = time.perf_counter()
            output = layer.forward(call.hidden, call.ids, call.weights)
            seconds.append(time.perf_counter() - begin)
            outputs.append(output.float())
        return seconds, outputs


def expert_tensors(file: GgufModel) -> list[str]:
    return [name for name in file.tensors if "_exps." in name]


def types_of(file: GgufModel) -> str:
    """The types of the experts, as "Q4_K, Q6_K"."""
    return ", ".join(sorted({file.info(name).type.name for name in expert_tensors(file)}))


def bytes_of_an_expert(file: GgufModel) -> float:
    """Mean over the layers."""
    names = expert_tensors(file)
    matrices = sum(file.info(name).shape[0] for name in names)
    return 3 * sum(file.info(name).bytes for name in names) / matrices


def passes_of(peer: Peer, tokens: int, vocabulary: int, seed: int) -> list[LayerPass]:
    """One round of the peer: a pass of many tokens, or passes of one token that follow each other."""
    generator = torch.Generator().manual_seed(seed)
    steps = _PASSES_OF_ONE_TOKEN if tokens == 1 else 1
    peer.forget()
    result: list[LayerPass] = []
    for _ in range(steps):
        ids = torch.randint(vocabulary, (tokens,), generator=generator).tolist()
        result += peer.run(ids)
    return result


def nmse(passes: Sequence[LayerPass], outputs: Sequence[torch.Tensor]) -> float:
    """The largest over the passes of |theirs - ours|^2 / |theirs|^2."""
    return max(
        ((given.output - ours).square().sum() / given.output.square().sum()).item()
        for given, ours in zip(passes, outputs, strict=True)
    )


class Comparison:
    """One file in both, ready to run."""

    def __init__(self, path: Path, most_tokens: int, threads: int, activations: str) -> None:
        self.path, self.threads = path, threads
        self.ours = OurLayers(path, threads, most_tokens, activations)
        self.peers = {
            repacking: Peer(
                path,
                threads=threads,
                context=max(most_tokens, 64),
                batch=most_tokens,
                repacking=repacking,
            )
            for repacking in ("as stored", "rearranged")
        }
        self.vocabulary = len(self.ours.file.metadata["tokenizer.ggml.tokens"])

    def rounds(self, tokens: int) -> Rounds:
        """All rounds of one token count."""
        for peer in self.peers.values():  # the first pass of a length is slower on either side
            self.ours.run(passes_of(peer, tokens, self.vocabulary, seed=0)[: len(self.ours.layers)])
        result = Rounds()
        for number in range(_ROUNDS):
            result.limits.append(measure_limits(self.ours.layers[0].cpu_infer))
            for name, peer in self.peers.items():
                time.sleep(_SETTLE_SECONDS)
                passes = passes_of(peer, tokens, self.vocabulary, seed=1 + number)
                result.seconds.setdefault(name, []).append([given.seconds for given in passes])
            time.sleep(_SETTLE_SECONDS)
            seconds, outputs = self.ours.run(passes)
            result.seconds.setdefault(_OURS, []).append(seconds)
            result.nmse = max(result.nmse, nmse(passes, outputs))
            result.distinct_experts += [given.call.distinct_experts for given in passes]
        return result

    def row(self, tokens: int) -> Row:
        """Measure one token count."""
        rounds = self.rounds(tokens)
        medians = {name: _median(each) for name, each in rounds.seconds.items()}
        peers = {name: medians[name] for name in self.peers}
        faster = rounds.seconds[min(peers, key=peers.__getitem__)]
        by_round = [_median([a]) / _median([b]) for a, b in zip(faster, rounds.seconds[_OURS], strict=True)]
        expert_bytes = statistics.mean(rounds.distinct_experts) * bytes_of_an_expert(self.ours.file)
        limits = median_limits(rounds.limits)
        return Row(
            file=self.path.name,
            types=types_of(self.ours.file),
            tokens=tokens,
            threads=self.threads,
            passes=sum(map(len, rounds.seconds[_OURS])),
            ours_ms=1e3 * medians[_OURS],
            peer_ms=1e3 * peers["as stored"],
            peer_rearranged_ms=1e3 * peers["rearranged"],
            ratio=min(peers.values()) / medians[_OURS],
            ratio_range=(min(by_round), max(by_round)),
            nmse=rounds.nmse,
            gigabytes_per_second=expert_bytes / medians[_OURS] / 1e9,
            share_of_read=expert_bytes / medians[_OURS] / limits["read"]["per_second"],
            variant=__cpu_variant__,
            limits=limits,
        )

    def close(self) -> None:
        """Give the peers' memory back."""
        for peer in self.peers.values():
            peer.close()


def _median(rounds: Sequence[Sequence[float]]) -> float:
    return statistics.median(value for each in rounds for value in each)


def text(row: Row) -> str:
    low, high = row.ratio_range
    return (
        f"{row.file:>24} ({row.types}) {row.tokens:>5} tokens  ours {row.ours_ms:8.3f} ms "
        f"{row.gigabytes_per_second:5.1f} GB/s read {row.share_of_read:4.0%}  "
        f"ik_llama.cpp {row.peer_ms:8.3f} ms, rearranged {row.peer_rearranged_ms:8.3f} ms  "
        f"theirs/ours {row.ratio:.2f} ({low:.2f}-{high:.2f})  "
        f"nmse {row.nmse:.1e}"
    )


def make_files(kinds: Sequence[str], layers: int, directory: Path) -> list[Path]:
    """Files of Qwen3-30B-A3B's layers, quantised by ik_llama.cpp; those that exist are taken."""
    sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "gguf_files"))
    import gguf_qwen3_moe
    import ik_llama

    size = replace(gguf_qwen3_moe.REAL, layers=layers)
    directory.mkdir(parents=True, exist_ok=True)
    source, importance = directory / f"source-{layers}.gguf", directory / f"importance-{layers}.dat"
    files = [directory / f"qwen3-{layers}-{kind}.gguf" for kind in kinds]
    missing = [(file, kind) for file, kind in zip(files, kinds, strict=True) if not file.exists()]
    if missing and not source.exists():
        gguf_qwen3_moe.write_qwen3_moe(source, size)
    for file, kind in missing:
        gguf_qwen3_moe.write_importance_of(importance, size)
        ik_llama.quantise(source, file, kind, importance=importance)
    return files


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--make", action="append", default=[], metavar="TYPE", help="such as Q4_K_M")
    parser.add_argument("--layers", type=int, default=3, help="of the files made")
    parser.add_argument(
        "--directory", type=Path, default=Path("/tmp/kt-gguf-files"), help="for the files made"
    )
    parser.add_argument("--tokens", default="1,1024")
    parser.add_argument("--threads", type=int, default=kt_kernel_ext.topology()["physical_cores"])
    parser.add_argument("--activations", default="auto", choices=("auto", "bf16", "int8"))
    parser.add_argument("--json", action="store_true", help="one JSON line per row")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tokens = [int(count) for count in arguments.tokens.split(",")]
    for path in [*arguments.files, *make_files(arguments.make, arguments.layers, arguments.directory)]:
        comparison = Comparison(path, max(tokens), arguments.threads, arguments.activations)
        for place, count in enumerate(tokens):
            row = comparison.row(count)
            if place == 0 and not arguments.json:
                print(f"variant {row.variant}; {describe_limits(row.threads, row.limits)}", flush=True)
            print(json.dumps(asdict(row)) if arguments.json else text(row), flush=True)
        comparison.close()
        del comparison
        gc.collect()


if __name__ == "__main__":
    main()
