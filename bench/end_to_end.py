"""Whole models on this CPU: our server, stock SGLang and ik_llama.cpp, on the same weights in the same run.

Each model is a checkpoint directory (ours and, with --stock, stock SGLang) or a GGUF file (ours and, where
bench/ik_llama.py finds it, ik_llama.cpp, whose weights are rearranged while loading). Those of one model are
all loaded; rounds alternate between them, so that the machine's moods hit all alike. A figure is the median
of the rounds. "decode" is one stream after a short prompt, as tokens/s and as a share of the read bandwidth
measured in the same run: the bytes a token must read are all dense matrices but the embedding, and its
experts. "pp" is a prompt of so many tokens, "ttft" a prompt of 16, in decode steps; "streams" 4 and 8 at a
time, as multiples of one stream.

    python bench/end_to_end.py --make BF16 --make Q8_0 --make Q4_K_M     # makes its files
    python bench/end_to_end.py CHECKPOINT_DIRECTORY FILE.gguf --stock
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import ik_llama
from gguf_peer import make_files
from ik_llama_model import WholeModel
from safetensors import safe_open
from served_model import ServedModel, served

from kt_kernel import kt_kernel_ext
from kt_kernel.bench.limits import measure_limits
from kt_kernel.engine import get_engine
from kt_kernel.gguf.model import open_gguf

PROMPTS = (128, 1024)
SHORT_PROMPT, NEW_TOKENS, STREAMS = 16, 48, (4, 8)
CONTEXT = 8 * 1200


@dataclass(frozen=True)
class Model:
    """`bytes_of_a_token`: what decoding one must read."""

    path: Path
    vocabulary: int
    bytes_of_a_token: float


def described(path: Path) -> Model:
    """Read a checkpoint's or a GGUF file's own description."""
    if path.suffix == ".gguf":
        return _of_gguf(path)
    config = json.loads((path / "config.json").read_text())
    experts = next(
        config[key] for key in ("num_experts", "num_local_experts", "n_routed_experts") if key in config
    )
    share = config["num_experts_per_tok"] / experts
    total = 0.0
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - it is not a dict
                size = opened.get_slice(name)
                count = _bytes_of(size.get_dtype(), size.get_shape())
                if "embed_tokens" not in name or config.get("tie_word_embeddings"):
                    total += count * (share if ".experts." in name else 1)
    return Model(path, config["vocab_size"], total)


def _of_gguf(path: Path) -> Model:
    file = open_gguf(path)
    key = file.architecture
    share = file.metadata[f"{key}.expert_used_count"] / file.metadata[f"{key}.expert_count"]
    total = sum(
        file.info(name).bytes * (share if "_exps." in name else 1)
        for name in file.tensors
        if not name.startswith("token_embd") or "output.weight" not in file.tensors
    )
    return Model(path, len(file.metadata["tokenizer.ggml.tokens"]), total)


def _bytes_of(dtype: str, shape: list[int]) -> float:
    bits = {"BF16": 16, "F16": 16, "F32": 32, "I32": 32, "I64": 64}.get(dtype, 8)
    count = 1
    for length in shape:
        count *= length
    return count * bits / 8


# One round of one side: name of the figure -> value.
Round = Callable[[int], dict[str, float]]


def _round_of_server(server: ServedModel, seed: int) -> dict[str, float]:
    figures = {"ttft": server.generate(SHORT_PROMPT, 1, seed)}
    figures["step"] = server.seconds_per_token(SHORT_PROMPT, NEW_TOKENS, seed)
    for tokens in PROMPTS:
        figures[f"pp{tokens}"] = tokens / server.generate(tokens, 1, seed)
    for streams in STREAMS:
        figures[f"x{streams}"] = server.tokens_per_second(streams, SHORT_PROMPT, NEW_TOKENS, 100 * seed)
    return figures


def _round_of_peer(peer: WholeModel, vocabulary: int, seed: int) -> dict[str, float]:
    prompt = [3 + (seed * 7919 + place * 104729) % (vocabulary - 3) for place in range(max(PROMPTS))]
    first, step = peer.seconds(prompt[:SHORT_PROMPT], NEW_TOKENS)
    figures = {"ttft": first, "step": step}
    for tokens in PROMPTS:
        figures[f"pp{tokens}"] = tokens / peer.seconds(prompt[:tokens], 0)[0]
    return figures


@contextlib.contextmanager
def sides(model: Model, arguments: argparse.Namespace) -> Iterator[dict[str, Round]]:
    """All that run this model, loaded."""
    threads = str(arguments.threads)
    ours = ["--kt-weight-path", str(model.path), "--kt-cpuinfer", threads, "--max-total-tokens", str(CONTEXT)]
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(served(model.path, ours, model.vocabulary, {}))
        found: dict[str, Round] = {"ours": lambda seed: _round_of_server(server, seed)}
        if model.path.suffix != ".gguf" and arguments.stock:
            options = ["--max-total-tokens", str(CONTEXT), "--sleep-on-idle"]
            environment = {"OMP_NUM_THREADS": threads, "KT_SGLANG_CPU_SHIMS": "1"}
            stock = stack.enter_context(served(model.path, options, model.vocabulary, environment))
            found["stock SGLang"] = lambda seed: _round_of_server(stock, seed)
        if model.path.suffix == ".gguf" and ik_llama.find() is not None:
            peer = WholeModel(
                model.path, threads=arguments.threads, context=2048, batch=1024, repacking="rearranged"
            )
            stack.callback(peer.close)
            found["ik_llama.cpp"] = lambda seed: _round_of_peer(peer, model.vocabulary, seed)
        yield found


def measure(model: Model, arguments: argparse.Namespace) -> list[dict[str, object]]:
    """A row for each side."""
    engine = get_engine(arguments.threads)
    reads: list[float] = []
    rounds: dict[str, list[dict[str, float]]] = {}
    with sides(model, arguments) as running:
        for side in running.values():
            side(0)  # the first steps of a size are recorded, pages come in
        for seed in range(1, 1 + arguments.rounds):
            reads.append(measure_limits(engine)["read"]["per_second"])
            for name, side in running.items():
                rounds.setdefault(name, []).append(side(seed))
    read = statistics.median(reads)
    rows = []
    for name, each in rounds.items():
        figures = {key: statistics.median(one[key] for one in each) for key in each[0]}
        step = figures.pop("step")
        rows.append(
            {
                "model": model.path.name,
                "side": name,
                "decode": 1 / step,
                "share_of_read": model.bytes_of_a_token / step / read,
                "ttft_in_steps": figures.pop("ttft") / step,
                **figures,
                "read_gb_s": read / 1e9,
            }
        )
    return rows


def text(row: dict[str, object]) -> str:
    streams = "".join(f"  x{n} {row[f'x{n}'] / row['decode']:.2f}" for n in STREAMS if f"x{n}" in row)
    prompts = "".join(f"  pp{n} {row[f'pp{n}']:7.1f}" for n in PROMPTS)
    return (
        f"{row['model']:>24} {row['side']:>13}  decode {row['decode']:6.1f} tok/s "
        f"({row['share_of_read']:4.0%} of {row['read_gb_s']:.1f} GB/s){prompts}  "
        f"ttft16 {row['ttft_in_steps']:.1f} steps{streams}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", type=Path, help="checkpoint directories and GGUF files")
    parser.add_argument("--make", action="append", default=[], metavar="TYPE", help="BF16, Q8_0, Q4_K_M, ...")
    parser.add_argument("--layers", type=int, default=4, help="of the files made")
    parser.add_argument("--directory", type=Path, default=Path("/tmp/kt-gguf-files"), help="for these")
    parser.add_argument("--stock", action="store_true", help="stock SGLang too (directories)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=kt_kernel_ext.topology()["physical_cores"])
    parser.add_argument("--json", action="store_true", help="one JSON line per row")
    arguments = parser.parse_args()
    for path in [*arguments.models, *make_files(arguments.make, arguments.layers, arguments.directory)]:
        for row in measure(described(path), arguments):
            print(json.dumps(row) if arguments.json else text(row), flush=True)


if __name__ == "__main__":
    main()
