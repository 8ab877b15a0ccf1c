"""Speed of one MoE layer of each method as a share of this machine's own limits.

Every call uses other tokens and other experts; the weights of a layer are larger than the caches, so they
come from memory. Each figure is a median. Columns: GB/s and read = bytes of the distinct experts used, as a
checkpoint stores them with their scales, per second, and their share of the measured read bandwidth; peak =
arithmetic per second / measured peak of bf16 products (f32 on CPUs that multiply no bf16) or, with int8
activations, of int8 products, for codes of 4 or of 8 bits as the method has them; roof = the time that the
slower of the two limits alone would take / time. The limits are measured several times between the calls of
each method and shape, because a machine's speed drifts; BF16 alternates with plain torch for the same reason.

    python bench/moe.py                          # all methods, shapes S and L, on all cores
    python bench/moe.py --method FP8 --method MXFP4 --shape S --tokens 1,16 --threads 1 --json
    python bench/moe.py --method RAWINT4 --activations bf16 --activations int8
    python bench/moe.py --type Q4_K --type IQ4_XS # blocks of a GGUF file, method LLAMAFILE
"""

from __future__ import annotations

import argparse

import torch
from torch_experts import copies_of_one_expert, torch_experts

from kt_kernel import __cpu_variant__, kt_kernel_ext
from kt_kernel.bench.limits import describe_limits
from kt_kernel.bench.measure import QUICK, THOROUGH, Others, kernels, measure_method
from kt_kernel.bench.random_blocks import BENCHED
from kt_kernel.bench.report import json_line, text_line
from kt_kernel.bench.shapes import SHAPES, Shape

USUAL_TYPES = ("Q8_0", "Q4_0", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "MXFP4")
DEFAULT_TOKENS = "1,2,4,8,16,32,64,128,256,512,1024"


def others(method: str, shape: Shape) -> Others:
    if method != "BF16":
        return {}
    experts = copies_of_one_expert(shape)
    return {"torch": lambda call: torch_experts(experts, call)}


def measure(method: str, ggml_type: str | None, shape: Shape, arguments: argparse.Namespace) -> None:
    known = kernels(method, ggml_type)
    activations = [kind for kind in arguments.activations or ["auto"] if kind in known]
    if not activations:
        print(
            f"{ggml_type or method} has no kernels for {' or '.join(arguments.activations)} activations here",
            flush=True,
        )
        return
    tokens = [int(count) for count in arguments.tokens.split(",")]
    rows = measure_method(
        method,
        shape,
        tokens,
        arguments.threads,
        QUICK if arguments.quick else THOROUGH,
        others=others(method, shape),
        activations=activations,
        ggml_type=ggml_type,
    )
    for place, row in enumerate(rows):
        if arguments.json:
            print(json_line(row), flush=True)
            continue
        if place == 0:
            limits = describe_limits(row.threads, row.limits)
            names = ", ".join(dict.fromkeys(each.kernel for each in rows))
            print(f"{names}; variant {__cpu_variant__}; {limits}", flush=True)
        print(text_line(row), flush=True)


def chosen(arguments: argparse.Namespace) -> list[tuple[str, str | None]]:
    """Methods, and the type where the method has several."""
    types = arguments.type or USUAL_TYPES
    methods = arguments.method or (["LLAMAFILE"] if arguments.type else kt_kernel_ext.METHODS)
    return [
        (method, ggml_type)
        for method in methods
        for ggml_type in (types if method == "LLAMAFILE" else [None])
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--method", choices=kt_kernel_ext.METHODS, action="append", help="default: all")
    parser.add_argument(
        "--type",
        choices=BENCHED,
        action="append",
        help=f"of LLAMAFILE; default: {', '.join(USUAL_TYPES)}",
    )
    parser.add_argument("--shape", choices=sorted(SHAPES), action="append", help="default: all")
    parser.add_argument(
        "--activations",
        choices=("auto", "bf16", "int8"),
        action="append",
        help="default: auto; several alternate",
    )
    parser.add_argument("--tokens", default=DEFAULT_TOKENS)
    parser.add_argument("--threads", type=int, default=kt_kernel_ext.topology()["physical_cores"])
    parser.add_argument("--quick", action="store_true", help="fewer calls of each row")
    parser.add_argument("--json", action="store_true", help="one JSON line per row instead of the table")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for name in arguments.shape or sorted(SHAPES, reverse=True):
        for method, ggml_type in chosen(arguments):
            measure(method, ggml_type, SHAPES[name], arguments)


if __name__ == "__main__":
    main()
