"""The tokens/s that `kt run` expects of a model, beside what its server is measured to do.

The machine's limits are measured in the same run, between the requests, so that a busy machine is expected to
be slow, too. A figure is the median of the rounds; "off" is measured / expected - 1. `kt bench serve` against
the same server measures the same (one user).

With --quiet, rounds wait for a moment in which other programs leave the cores alone (at most four minutes),
and rounds before and after which the limits differ by a third do not count.

    python bench/expected_speed.py demo CHECKPOINT_DIRECTORY FILE.gguf
    python bench/expected_speed.py --make /tmp/synthetic     # four layers of Qwen3-30B-A3B, 64 experts, bf16
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
from dataclasses import replace
from pathlib import Path

import psutil
import torch
from random_moe import LARGE, write_checkpoint
from served_model import served

from kt_kernel import kt_kernel_ext
from kt_kernel.cli.model import Model, find_model
from kt_kernel.cli.planned import plan_for
from kt_kernel.machine_limits import Limits
from kt_kernel.planning.estimate import PROMPT
from kt_kernel.planning.plan import Plan, Preferences, make_plan
from kt_kernel.planning.this_machine import measure
from kt_kernel.planning.user_options import UserOptions

SHORT_PROMPT, NEW_TOKENS = 16, 48
_BUSY_PERCENT = 15


def expected(plan: Plan, model: Model, limits: Limits) -> Plan:
    """The plan for the same machine with other limits."""
    machine = replace(plan.machine, limits=limits)
    return make_plan(plan.name, plan.facts, machine, UserOptions(), Preferences(dtype=model.dtype))


def wait_until_idle(most_seconds: float) -> None:
    """Until all cores together were 85 % idle for two seconds."""
    deadline = time.monotonic() + most_seconds
    while time.monotonic() < deadline and psutil.cpu_percent(2) > _BUSY_PERCENT:
        pass


def measured(model: Model, plan: Plan, rounds: int, quiet_seconds: float) -> list[dict[str, float]]:
    """Expected and measured tokens/s of each round."""
    options = ["--kt-weight-path", str(model.path), "--max-total-tokens", "8192"]
    options += ["--dtype", model.dtype] if model.dtype else []
    found = []
    with served(model.path, options, plan.facts.sizes.vocabulary, {}) as server:
        server.generate(PROMPT, 8, 1)
        for seed in range(2, rounds + 2):
            wait_until_idle(quiet_seconds)
            before = measure(kt_kernel_ext, plan.machine.threads)
            step = server.seconds_per_token(SHORT_PROMPT, NEW_TOKENS, seed)
            prompt = server.generate(PROMPT, 1, seed)
            after = measure(kt_kernel_ext, plan.machine.threads)
            limits = Limits(
                *(((getattr(before, n) + getattr(after, n)) / 2) for n in ("read", "bf16", "int8"))
            )
            made = expected(plan, model, limits)
            steady = max(before.read, after.read) < 1.33 * min(before.read, after.read)
            if quiet_seconds and not steady:
                print(
                    f"round {seed} was disturbed: {before.read / 1e9:.1f}, {after.read / 1e9:.1f} GB/s",
                    flush=True,
                )
                continue
            found.append(
                {
                    "read": limits.read / 1e9,
                    "bf16": limits.bf16 / 1e9,
                    "decode_expected": made.decode.tokens_per_second,
                    "decode": 1 / step,
                    "prefill_expected": made.prefill.tokens_per_second,
                    "prefill": PROMPT / prompt,
                }
            )
            print(json.dumps(found[-1]), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--make", type=Path, help="write a synthetic model there, and measure it, too")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quiet", action="store_true", help="wait for quiet moments")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    names = list(arguments.models)
    if arguments.make:
        write_checkpoint(arguments.make, replace(LARGE, layers=4), torch.device("cpu"))
        names.append(str(arguments.make))
    for name in names:
        model = find_model(name).model
        plan = plan_for(model, []).plan
        rounds = measured(model, plan, arguments.rounds, 240 if arguments.quiet else 0)
        median = {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}
        for what in ("decode", "prefill"):
            off = statistics.median(one[what] / one[f"{what}_expected"] for one in rounds) - 1
            print(
                f"{model.served_name} {what}: expected {median[f'{what}_expected']:.1f}, "
                f"measured {median[what]:.1f} tokens/s, off {off:+.0%}"
            )


if __name__ == "__main__":
    main()
