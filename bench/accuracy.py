"""What each weight format and each kind of activations costs a real model: perplexity on English prose.

The model is that of `kt run --demo` (SmolLM2-135M-Instruct), its MLPs as four experts of 384 neurons that
are all chosen with weight 1; everything but the experts is transformers' own in fp32. Hidden states are
padded with zeros from 576 to 640 columns, so that groups of 128 divide them. The text is the paragraphs of
at least 50 words in the language reference that comes with Python (pydoc_data.topics), in windows of 512
tokens that know nothing of each other.

    python bench/accuracy.py                                      # the table of doc/accuracy.md
    python bench/accuracy.py --method RAWINT4 --tokens 16384

Columns: bytes per weight with scales; perplexity with bf16 activations, and how far above the fp32 model's;
perplexity with int8 activations, and how far above the same weights with bf16 activations, with the
standard error of that difference ("-" where the method has no kernels for int8 activations); what the
weights cost (100 * the logarithm of perplexity / the fp32 model's) times bytes per weight: half the loss is
worth twice the bytes, less is better.
"""

from __future__ import annotations

import argparse
import math
import pydoc_data.topics
import re
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import cross_entropy, pad
from transformers import AutoTokenizer, LlamaForCausalLM

from kt_kernel import KTMoEWrapper, kt_kernel_ext
from kt_kernel.bench.measure import kernels
from kt_kernel.demo import ensure_demo_checkpoint, load_dense_model
from kt_kernel.errors import InputError
from kt_kernel.formats.quantize.experts import quantize_experts
from kt_kernel.formats.record import WHOLE_ROW

EXPERTS = 4
WIDTH_MULTIPLE = 128
WINDOW = 512
WORDS_OF_A_PARAGRAPH = 50


@dataclass(frozen=True)
class Format:
    """A method, and the columns that share a scale where they are free; None = as usual for the method."""

    method: str
    group_size: int | None = None

    @property
    def name(self) -> str:
        """As the table calls it."""
        groups = {None: "", WHOLE_ROW: ", per row"}.get(self.group_size, f", groups of {self.group_size}")
        return f"`{self.method}`{groups}"


FORMATS = (
    Format("BF16"),
    Format("FP8"),
    *(Format("AMXINT8", size) for size in (WHOLE_ROW, 128, 32)),
    *(Format("AMXINT4", size) for size in (WHOLE_ROW, 128, 64, 32)),
    Format("RAWINT4", 32),
    Format("MXFP4"),
    Format("NVFP4"),
)


class Experts(nn.Module):
    """An MLP of the model on the product's kernels; `bytes_per_weight` counts codes and scales."""

    def __init__(self, layer: int, mlp: nn.Module, form: Format, threads: int) -> None:
        super().__init__()
        gate, up = (_padded(each.weight, 1) for each in (mlp.gate_proj, mlp.up_proj))
        down = _padded(mlp.down_proj.weight, 0)
        self.experts = quantize_experts(
            form.method,
            [part.contiguous() for part in gate.chunk(EXPERTS)],
            [part.contiguous() for part in up.chunk(EXPERTS)],
            [part.contiguous() for part in down.chunk(EXPERTS, 1)],
            form.group_size,
        )
        tensors = [tensor for m in self.experts.all() for tensor in (m.weight, m.scale) if tensor is not None]
        self.bytes_per_weight = sum(tensor.nbytes for tensor in tensors) / (3 * gate.numel())
        self.options = {
            "layer_idx": layer,
            "num_experts": EXPERTS,
            "num_experts_per_tok": EXPERTS,
            "hidden_size": gate.shape[1],
            "moe_intermediate_size": gate.shape[0] // EXPERTS,
            "cpuinfer_threads": threads,
            "threadpool_count": 1,
            "weight_path": "",
            "chunked_prefill_size": WINDOW,
            "method": form.method,
        }

    def use(self, activations: str) -> None:
        """From now on rounds the experts' inputs to "bf16" or "int8"."""
        self.wrapper = KTMoEWrapper(**self.options, activations=activations)
        self.wrapper._load(self.experts, list(range(EXPERTS)), InputError)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 [1, T, H] -> the same."""
        rows = pad(hidden[0], (0, self.options["hidden_size"] - hidden.shape[-1]))
        ids = torch.arange(EXPERTS).expand(len(rows), EXPERTS).contiguous()
        outputs = self.wrapper.forward(rows, ids, torch.ones(ids.shape))
        return outputs[None, :, : hidden.shape[-1]]


def _padded(weight: torch.Tensor, axis: int) -> torch.Tensor:
    missing = -weight.shape[axis] % WIDTH_MULTIPLE
    return pad(weight, (0, missing) if axis == 1 else (0, 0, 0, missing)).bfloat16()


def prose() -> str:
    """Each long paragraph of the reference once, without its line breaks, by the topics' names."""
    paragraphs = {}
    for _, topic in sorted(pydoc_data.topics.topics.items()):
        for paragraph in re.split(r"\n\s*\n", topic):
            words = paragraph.split()
            if len(words) >= WORDS_OF_A_PARAGRAPH and not paragraph[0].isspace():
                paragraphs[" ".join(words)] = None
    return "\n\n".join(paragraphs)


def windows(tokens: int) -> torch.Tensor:
    """int64 [tokens / WINDOW, WINDOW]: the first tokens of the prose."""
    tokenizer = AutoTokenizer.from_pretrained(ensure_demo_checkpoint())
    ids = tokenizer(prose(), return_tensors="pt").input_ids[0]
    length = min(tokens, WINDOW)
    count = tokens // length
    if len(ids) < count * length:
        raise SystemExit(f"--tokens is {tokens}, but the text has {len(ids)} tokens: use at most so many")
    return ids[: count * length].view(count, length)


@torch.inference_mode()
def losses(model: LlamaForCausalLM, text: torch.Tensor) -> torch.Tensor:
    """float64 [predictions]: minus the logarithm of the probability of every token but the windows' first."""
    each = []
    for window in text:
        logits = model(window[None]).logits[0, :-1]
        each.append(cross_entropy(logits.float(), window[1:], reduction="none"))
    return torch.cat(each).double()


def perplexity(each: torch.Tensor) -> float:
    return math.exp(each.mean())


def per_cent_above(each: torch.Tensor, other: torch.Tensor) -> tuple[float, float]:
    """How far the perplexity of `each` lies above that of `other`, and the standard error, both in %."""
    difference = each - other
    error = difference.std() / math.sqrt(len(difference))
    return 100 * math.expm1(difference.mean()), 100 * float(error)


class Measured:
    """The model with its MLPs replaced for one format and kind of activations at a time."""

    def __init__(self, tokens: int, threads: int) -> None:
        self.model = load_dense_model(torch.float32)
        self.mlps = [layer.mlp for layer in self.model.model.layers]
        self.text = windows(tokens)
        self.threads = threads
        self.reference = losses(self.model, self.text)

    def bytes_per_weight(self, form: Format) -> float:
        """Puts experts of this format in the place of the MLPs."""
        for index, (layer, mlp) in enumerate(zip(self.model.model.layers, self.mlps, strict=True)):
            layer.mlp = Experts(index, mlp, form, self.threads)
        return self.model.model.layers[0].mlp.bytes_per_weight

    def losses_with(self, activations: str) -> torch.Tensor:
        """Losses of the model with the experts that are in place."""
        for layer in self.model.model.layers:
            layer.mlp.use(activations)
        return losses(self.model, self.text)

    def line(self, form: Format) -> str:
        """The table's line of a format."""
        size = self.bytes_per_weight(form)
        bf16 = self.losses_with("bf16")
        above, _ = per_cent_above(bf16, self.reference)
        cells = [form.name, f"{size:.3f}", f"{perplexity(bf16):.3f}", f"{above:+.2f} %"]
        if "int8" in kernels(form.method):
            int8 = self.losses_with("int8")
            cost, error = per_cent_above(int8, bf16)
            cells += [f"{perplexity(int8):.3f}", f"{cost:+.2f} ± {error:.2f} %"]
        else:
            cells += ["-", "-"]
        lost = float((bf16 - self.reference).mean())
        return _row([*cells, f"{100 * max(lost, 0) * size:.2f}"])


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--method", choices=kt_kernel_ext.METHODS, action="append", help="default: all of the table"
    )
    parser.add_argument("--tokens", type=int, default=4096, help="default: %(default)s; whole windows count")
    parser.add_argument("--threads", type=int, default=kt_kernel_ext.topology()["physical_cores"])
    arguments = parser.parse_args()
    chosen = arguments.method or kt_kernel_ext.METHODS
    torch.set_num_threads(arguments.threads)
    measured = Measured(arguments.tokens, arguments.threads)
    text = (
        f"{measured.text.numel()} tokens; the model in fp32: perplexity {perplexity(measured.reference):.3f}"
    )
    print(text, end="\n\n")
    print(_row(["format", "bytes per weight", "bf16", "above fp32", "int8", "above bf16", "loss x bytes"]))
    print(_row(["---"] * 7))
    for form in FORMATS:
        if form.method in chosen:
            print(measured.line(form), flush=True)


if __name__ == "__main__":
    main()
