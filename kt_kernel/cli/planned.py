"""`kt run` from a name to a plan: which model is meant, what is known of it, and what goes where."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

from kt_kernel.cli.machine import native_extension, server_environment
from kt_kernel.cli.model import DEMO, Model
from kt_kernel.errors import KTError
from kt_kernel.planning.checkpoint_facts import keep_facts, read_facts
from kt_kernel.planning.errors import DoesNotFitError
from kt_kernel.planning.machine_facts import MachineFacts
from kt_kernel.planning.model_facts import ModelFacts
from kt_kernel.planning.plan import Fit, Plan, Preferences, make_plan
from kt_kernel.planning.registry import Entry, load_registry
from kt_kernel.planning.this_machine import keep_machine, machine_facts
from kt_kernel.planning.user_options import UserOptions
from kt_kernel.user_cache import cache_root

log = logging.getLogger(__name__)

_STATISTICS_ENDINGS = (".pt", ".json", ".npy")


@dataclass(frozen=True)
class Planned:
    """`plan`: None if `reason` kept us from making one. The rest is what is worth keeping for next time."""

    plan: Plan | None
    reason: str
    facts: ModelFacts | None = None
    machine: MachineFacts | None = None
    measurements: int = 0


def plan_for(model: Model, options: list[str], entry: Entry | None = None, fit: Fit = Fit.REFUSE) -> Planned:
    """The plan for a model on this machine. `entry`: the registry's, of a model that was called by its name.

    Raises DoesNotFitError. Anything else that keeps us from planning is said in `reason`: the server that is
    started without a plan says what is wrong with the model in its own words.
    """
    user = UserOptions(tuple(options))
    try:
        facts = _facts(model, user, entry)
        machine, measurements = machine_facts(native_extension(), server_environment())
        preferences = _preferences(model, facts, entry)
        plan = make_plan(model.served_name, facts, machine, user, preferences, fit)
    except DoesNotFitError:
        raise
    except KTError as error:
        return Planned(None, str(error))
    return Planned(plan, "", facts, machine, measurements)


def keep(model: Model, options: list[str], planned: Planned) -> None:
    """Remember what was read and measured."""
    if planned.facts is not None and model.path.exists():
        keep_facts(model.path, planned.facts, _weights(UserOptions(tuple(options))))
    if planned.machine is not None:
        keep_machine(planned.machine, planned.measurements)


def _weights(user: UserOptions) -> Path | None:
    said = user.text("--kt-weight-path")
    return Path(said).expanduser() if said else None


def _facts(model: Model, user: UserOptions, entry: Entry | None) -> ModelFacts:
    if model.path.exists():
        return read_facts(model.path, _weights(user))
    if entry is None:
        entry = load_registry().find(model.served_name)
    if entry is None:
        raise KTError(f"{model.path} is not there yet.")
    return entry.facts()


def _preferences(model: Model, facts: ModelFacts, entry: Entry | None) -> Preferences:
    if model.served_name == DEMO:
        return Preferences(dtype=model.dtype)
    if entry is None:
        entry = load_registry().like(model.path.name, facts.sizes)
    statistics = _statistics(model.served_name)
    if entry is None:
        return Preferences(dtype=model.dtype, statistics=statistics)
    notes = entry.notes
    if not entry.is_as_large(facts.sizes):
        notes = (*notes, f"Not in the registry: parsers are those of {entry.name}, of the same family.")
    return Preferences(
        dtype=model.dtype,
        tool_call_parser=entry.tool_call_parser,
        reasoning_parser=entry.reasoning_parser,
        flags=entry.flags,
        statistics=statistics,
        notes=notes,
    )


def _statistics(name: str) -> str | None:
    """A recording that the user has put where plans look for it (doc/run.md)."""
    base = cache_root() / "statistics" / name.replace(os.sep, "--")
    return next((str(found) for end in _STATISTICS_ENDINGS if (found := Path(f"{base}{end}")).exists()), None)
