"""The --kt-* flags: one table, their values as a dataclass, and the checks that need nothing but the flags.

What they say about experts becomes `ExpertOptions`, which checks it (kt_kernel/integrations/options.py).

SGLang 0.5.23 itself has six of them (`own=None` in the table); the others are added to its command line. A
flag whose behaviour is not built yet is refused with "not available yet", never ignored, and so is a
combination in which a flag could have no effect.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from kt_kernel.errors import CheckpointPathError, ConfigurationError
from kt_kernel.formats.methods import AUTO
from kt_kernel.hybrid.options import MISS_POLICIES, ON_CPU
from kt_kernel.hybrid.placement import STRATEGIES
from kt_kernel.hybrid.shares import AUTO as AUTO_RANKS
from kt_kernel.hybrid.shares import CPU_RANKS
from kt_kernel.integrations.options import ExpertOptions
from kt_kernel.layer_config import ACTIVATIONS

# What SGLang's --init-expert-location says when it is not given.
NO_STATISTICS = "trivial"


@dataclass(frozen=True)
class Flag:
    """One row: the attribute of KTFlags, the option, what doc/serving.md says it means and is by default, and
    how argparse is to read it (None: SGLang declares it).
    """

    field: str
    option: str
    meaning: str
    default: str
    own: Mapping[str, Any] | None = None

    @property
    def destination(self) -> str:
        """The name on argparse's namespace, on SGLang's ServerArgs and among the arguments of
        `sglang.Engine`.
        """
        return self.option.removeprefix("--").replace("-", "_")

    @property
    def help(self) -> str:
        """`meaning` without Markdown, for a terminal; argparse takes % for its own."""
        text = re.sub(r"\s*\(\[[^]]*\]\([^)]*\)\)|`", "", self.meaning).replace("%", "%%")
        return f"{text[0].upper()}{text[1:]} (default: {self.default.replace('`', '')})."


# In the order of doc/serving.md, whose table scripts/option_tables.py writes from this one.
FLAGS = (
    Flag(
        "weight_path",
        "--kt-weight-path",
        "directory with the expert weights, or their GGUF file; turns CPU experts on",
        "off (`kt run`: the model)",
    ),
    Flag(
        "method",
        "--kt-method",
        "format of these weights; another one in the directory is an error",
        "`AUTO`: what the directory holds",
    ),
    Flag(
        "activations",
        "--kt-activations",
        "what the CPU rounds the experts' inputs to: `bf16`, `int8`, or `auto` for the faster one",
        "`auto`",
        {"choices": ACTIVATIONS, "default": "auto"},
    ),
    Flag(
        "gguf_mmap",
        "--kt-gguf-mmap",
        "compute from the mapped GGUF file, without memory for the experts "
        "([formats](formats.md#gguf)); slower",
        "off",
        {"action": "store_true"},
    ),
    Flag(
        "cpuinfer",
        "--kt-cpuinfer",
        "CPU threads in total",
        "physical cores, or what the control group grants of them",
    ),
    Flag(
        "threadpool_count",
        "--kt-threadpool-count",
        "thread pools the threads are shared out over",
        "NUMA nodes",
    ),
    Flag(
        "numa_nodes",
        "--kt-numa-nodes",
        "NUMA node of each thread pool",
        "those with cores for us, in order",
        {"type": int, "nargs": "+"},
    ),
    Flag(
        "num_gpu_experts",
        "--kt-num-gpu-experts",
        "experts of each layer that live on SGLang's device",
        "0",
    ),
    Flag(
        "gpu_experts_ratio",
        "--kt-gpu-experts-ratio",
        "share of all experts that live on the device, 0 to 1; overrides `--kt-num-gpu-experts`",
        "not used",
        {"type": float},
    ),
    Flag(
        "expert_placement_strategy",
        "--kt-expert-placement-strategy",
        "which experts live on the device: `uniform`, `front-loading`, `random` or `frequency`",
        "`uniform`",
        {"choices": STRATEGIES, "default": "uniform"},
    ),
    Flag(
        "max_deferred_experts_per_token",
        "--kt-max-deferred-experts-per-token",
        "experts of a token that may be added one layer later",
        "0",
    ),
    Flag(
        "gpu_prefill_token_threshold",
        "--kt-gpu-prefill-token-threshold",
        "prompts of at least so many new tokens run wholly on the device, layer after layer",
        "0: none",
        {"type": int},
    ),
    Flag(
        "enable_dynamic_expert_update",
        "--kt-enable-dynamic-expert-update",
        "experts move to the device while serving: after such chunks, or at intervals",
        "off",
        {"action": "store_true"},
    ),
    Flag(
        "expert_update_interval",
        "--kt-expert-update-interval",
        "look every so many steps which experts to move",
        "0: after long prompts only",
        {"type": int},
    ),
    Flag(
        "miss_policy",
        "--kt-miss-policy",
        "experts that are not on the device: `cpu` computes them, `auto` also fetches some",
        "`cpu`",
        {"choices": MISS_POLICIES, "default": ON_CPU},
    ),
    Flag(
        "cpu_ranks",
        "--kt-cpu-ranks",
        "with several ranks: `auto`, each computes its share of the experts on the CPU; `first`, rank 0 all "
        "of them",
        "`auto`",
        {"choices": CPU_RANKS, "default": AUTO_RANKS},
    ),
    Flag(
        "verify",
        "--kt-verify",
        "check one token of every so many calls of a layer by the slow reference "
        "([reliability](reliability.md))",
        "0: never",
        {"type": int},
    ),
    Flag(
        "record_gpu_expert_distribution",
        "--record-kt-gpu-expert-distribution",
        "lets the server record which experts were used, and where they were",
        "off",
        {"action": "store_true"},
    ),
    Flag(
        "cpu_operators",
        "--kt-cpu-operators",
        "without a GPU: `on`, our operators compute the layers around the experts "
        "([operators](operators.md)); `off`, torch does",
        "`on`",
        {"choices": ("on", "off"), "default": "on"},
    ),
    Flag(
        "lora_path",
        "--kt-lora-path",
        "the same as `--kt-expert-lora-path`",
        "none",
        {},
    ),
    Flag(
        "expert_lora_path",
        "--kt-expert-lora-path",
        "folder of an adapter that is served with the model ([training](training.md#serving))",
        "none",
        {},
    ),
)

# SGLang's own, with a meaning of its own where there are no CPU experts: not among FLAGS.
STATISTICS = Flag(
    "init_expert_location",
    "--init-expert-location",
    "SGLang's flag; with `frequency`, the file with the counts (`.pt`, `.json`, `.npy`)",
    "none",
)

_OPTIONS = {flag.field: flag.option for flag in (*FLAGS, STATISTICS)}


@dataclass(frozen=True, kw_only=True)
class FlaggedOptions(ExpertOptions):
    """Options that were given as flags."""

    def spelled(self, field: str) -> str:
        return _OPTIONS[field]


@dataclass(frozen=True)
class KTFlags:
    """The values given. None = not given."""

    weight_path: str | None = None
    method: str = AUTO
    activations: str = "auto"
    gguf_mmap: bool = False
    cpuinfer: int | None = None
    threadpool_count: int | None = None
    num_gpu_experts: int | None = None
    max_deferred_experts_per_token: int | None = None
    numa_nodes: tuple[int, ...] | None = None
    gpu_experts_ratio: float | None = None
    expert_placement_strategy: str = "uniform"
    gpu_prefill_token_threshold: int | None = None
    enable_dynamic_expert_update: bool = False
    expert_update_interval: int | None = None
    miss_policy: str = ON_CPU
    cpu_ranks: str = AUTO_RANKS
    verify: int | None = None
    record_gpu_expert_distribution: bool = False
    cpu_operators: str = "on"
    lora_path: str | None = None
    expert_lora_path: str | None = None
    init_expert_location: str = NO_STATISTICS

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> KTFlags:
        """From a namespace's dict, or keyword arguments, by the destinations of the table; the rest is
        ignored.
        """
        given = {flag.field: values.get(flag.destination) for flag in (*FLAGS, STATISTICS)}
        if given["numa_nodes"] is not None:
            given["numa_nodes"] = tuple(given["numa_nodes"])
        return cls(**{name: value for name, value in given.items() if value is not None})

    def given(self) -> list[str]:
        """The options whose values are not the defaults."""
        defaults = {field.name: field.default for field in fields(self)}
        return [flag.option for flag in FLAGS if getattr(self, flag.field) != defaults[flag.field]]

    def options(self) -> FlaggedOptions:
        """What they say about experts; raises ConfigurationError for values that cannot work.

        With a weight path only.
        """
        names = [field.name for field in fields(ExpertOptions)]
        values = {name: value for name in names if (value := getattr(self, name)) is not None}
        if self.init_expert_location == NO_STATISTICS:
            del values["init_expert_location"]
        return FlaggedOptions(**values)


def check_flags(flags: KTFlags) -> None:
    """Check the flags for themselves and against each other; raises a KTError with one sentence."""
    if flags.weight_path is None:
        _refuse_flags_without_effect(flags)
        return
    if None not in (flags.lora_path, flags.expert_lora_path) and flags.lora_path != flags.expert_lora_path:
        raise ConfigurationError(
            f"--kt-lora-path is {flags.lora_path} and --kt-expert-lora-path is {flags.expert_lora_path}; "
            "they mean the same, give only the second."
        )
    if not os.path.exists(flags.weight_path):
        raise CheckpointPathError(
            f"--kt-weight-path {flags.weight_path} does not exist; name the directory with the experts' "
            "weights, or their GGUF file: often the model itself."
        )
    flags.options()


def _refuse_flags_without_effect(flags: KTFlags) -> None:
    given = flags.given()
    if given:
        raise ConfigurationError(
            f"{given[0]} is given without --kt-weight-path, so no expert would run on the CPU; add "
            "--kt-weight-path "
            f"with the directory of the experts' weights, or leave {given[0]} out."
        )
