"""At the start, on the device: do slots in SGLang's own format compute what decoded ones do?

What slot_formats/ rearranges follows what SGLang and its kernels expect, which another release, GPU or
driver may see differently. So each kind of slot is tried once per encoding, and used only if it is right.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

from kt_kernel.formats.expert_image import ExpertEncoding
from kt_kernel.hybrid.device import backend_of
from kt_kernel.hybrid.experts import DeviceExperts
from kt_kernel.hybrid.slot_check import SLOTS, difference, sample_tokens

logger = logging.getLogger(__name__)

# Activations in e4m3 have an NMSE of 7e-4 in each of two products; whatever is misplaced, of 1e-1 and more.
_QUANTISED_ACTIVATIONS = 1e-2
_ROUNDED = 1e-3  # to bfloat16: 1e-5


@dataclass(frozen=True)
class Verdict:
    """`error`: the NMSE against decoded slots, None if there was none to compare; `reason` if not right."""

    is_right: bool
    error: float | None
    reason: str = ""


@dataclass(frozen=True)
class Trial:
    """A kind of slot of one encoding on one device; `name` says whose."""

    name: str
    encoding: ExpertEncoding
    device: torch.device
    dtype: torch.dtype

    @property
    def tolerance(self) -> float:
        """The NMSE that rounding may cause."""
        return _QUANTISED_ACTIVATIONS if "FP8" in self.encoding.method else _ROUNDED


_verdicts: dict[Trial, Verdict] = {}


def is_right(
    trial: Trial, native: Callable[[int], DeviceExperts | None], decoded: Callable[[int], DeviceExperts]
) -> bool:
    """Whether slots of that kind can be used; tried at the first call, and said once if they cannot.

    `native(n)` and `decoded(n)` make n slots; None = there is no such kind here, about which nothing is said.
    """
    verdict = _verdicts.get(trial)
    if verdict is None:
        verdict = _verdicts[trial] = examine(trial, native, decoded)
        if verdict.reason:
            logger.warning(
                "experts of %s cannot be kept on %s as %s holds them: %s. They are decoded on their way "
                "there, which takes more device memory; please report this with the output of kt doctor "
                "--device",
                trial.encoding.method,
                trial.device,
                trial.name,
                verdict.reason,
            )
    return verdict.is_right


def examine(
    trial: Trial, native: Callable[[int], DeviceExperts | None], decoded: Callable[[int], DeviceExperts]
) -> Verdict:
    """The trial itself. Never raises: whatever a kernel that was never run may end with is a reason."""
    try:
        with torch.inference_mode(mode=False), torch.no_grad():
            slots = native(SLOTS)
            if slots is None:
                return Verdict(is_right=False, error=None)
            hidden = sample_tokens(trial.encoding.hidden, trial.dtype, trial.device)
            error = difference(slots, decoded(SLOTS), trial.encoding, hidden)
            backend_of(trial.device).synchronize()
    except Exception as problem:
        return Verdict(is_right=False, error=None, reason=f"{type(problem).__name__}: {problem}")
    if error <= trial.tolerance:
        return Verdict(is_right=True, error=error)
    reason = f"results differ by an NMSE of {error:.1e}, expected at most {trial.tolerance:.0e}"
    return Verdict(is_right=False, error=error, reason=reason)
