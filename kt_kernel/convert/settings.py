"""The options of scripts/convert_cpu_weights.py and `kt quant`, with those of older converters.

Options that had a meaning only for the older files (pools, .kt trees) are accepted and answered with a note.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from kt_kernel import kt_kernel_ext
from kt_kernel.convert.job import Conversion, Outcome, convert
from kt_kernel.convert.progress import Progress
from kt_kernel.convert.source import INPUT_TYPES
from kt_kernel.convert.targets import GROUP_SIZES, target
from kt_kernel.errors import KTError
from kt_kernel.threads import usable_cores

DEFAULT_METHOD = "int4"

# attribute -> what the user should know if it was given.
_NOTES = {
    "threadpool_count": "--threadpool-count: not needed, the output serves any number of pools",
    "gpu": "--gpu: not needed, float8 is decoded on the CPU",
    "no_merge_safetensor": "--no-merge-safetensor: ignored, at most one layer is in memory",
    "resume_layer": "--resume-layer: ignored, finished layers are found and kept",
    "save_backward_weights": "--save-backward-weights: ignored, training reads the same weights",
    "profile": "--profile: ignored, use a sampling profiler such as py-spy",
}


def default_threads() -> int:
    """One per usable core."""
    return usable_cores(kt_kernel_ext.topology())


def run(conversion: Conversion) -> str:
    """Convert, with progress on standard error; returns one line for the user. Raises KTError."""
    outcome = convert(conversion, Progress)
    return describe(conversion, outcome)


def describe(conversion: Conversion, outcome: Outcome) -> str:
    """ "12 layers converted, 3 were finished already: 'out' holds AMXINT8 in 4.10 GB"."""
    found = f", {outcome.found} were finished already" if outcome.found else ""
    return (
        f"{outcome.converted} layers converted{found}: '{conversion.output}' holds "
        f"{conversion.target.method} in {outcome.output_bytes / 1e9:.2f} GB; serve it with --kt-weight-path."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; exit status 1 with one sentence for what cannot be done."""
    options = _parser().parse_args(arguments)
    for name, note in _NOTES.items():
        if getattr(options, name) not in (None, False):
            _say(f"note: {note}.")
    try:
        conversion = Conversion(
            Path(options.input_path),
            Path(options.output),
            target(options.quant_method, options.group_size),
            options.cpuinfer_threads or default_threads(),
            options.input_type,
        )
        _say(run(conversion))
    except KTError as error:
        _say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        _say("interrupted: run the same command again to continue.")
        return 130
    return 0


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Quantise the experts of a checkpoint to 8-bit or 4-bit integers for the CPU. The same "
        "command continues an interrupted run."
    )
    parser.add_argument("--input-path", "-i", required=True, help="the model's folder; it is only read")
    parser.add_argument("--output", "-o", required=True, help="an empty folder, or one to continue")
    parser.add_argument(
        "--input-type", choices=list(INPUT_TYPES), help="checked against the input, which shows it anyway"
    )
    parser.add_argument(
        "--quant-method",
        default=DEFAULT_METHOD,
        help="int4 or int8; moe_int4 and moe_int8 mean the same (default: %(default)s)",
    )
    parser.add_argument(
        "--group-size",
        type=int,
        help=f"columns that share a scale: {', '.join(map(str, GROUP_SIZES))} (0 = a row; default: what is "
        "usual for the method and divides the matrices)",
    )
    parser.add_argument("--cpuinfer-threads", type=int, help="default: one per usable core")
    old = parser.add_argument_group("accepted for compatibility, without effect")
    old.add_argument("--threadpool-count", type=int)
    old.add_argument("--resume-layer", type=int)
    for flag in ("--gpu", "--no-merge-safetensor", "--save-backward-weights", "--profile"):
        old.add_argument(flag, action="store_true")
    return parser
