"""Opens SGLang's gate for CPU operators (`cpu_has_amx_support`), behind which kt-kernel's are registered.

46 modules of SGLang ask the gate while they are imported, so it must be open before the first of them is: a
finder at the front of `sys.meta_path` waits for `sglang.srt` and then finds nothing itself. The operators run
on every CPU with AVX2, whatever the name of the question.
"""

import itertools
import sys

SWITCH = "KT_CPU_OPERATORS"
OPTION = "--kt-cpu-operators"
ON, OFF = "on", "off"


def wanted(argv, environ):
    """The environment variable decides, else the command: servers with a --kt option have the operators,
    unless `--kt-cpu-operators off` is one of them.
    """
    chosen = environ.get(SWITCH)
    if chosen is None:
        options = [argument for argument in argv if argument.startswith("--kt-")]
        following = dict(itertools.pairwise(argv))
        is_off = following.get(OPTION) == OFF or f"{OPTION}={OFF}" in options
        chosen = ON if options and not is_off else OFF
    return chosen == ON


class GateOpener:
    """First entry of `sys.meta_path` until `sglang.srt` is imported; the class itself is the finder."""

    @staticmethod
    def find_spec(fullname, path=None, target=None):
        if fullname == "sglang.srt":
            sys.meta_path.remove(GateOpener)
            open_gate()
        return None


def open_gate():
    import logging

    import torch

    try:
        from kt_kernel import operators

        operators.register()
    except Exception as error:
        logging.getLogger(__name__).warning(
            "kt-kernel's operators for CPUs cannot be used, so torch computes the layers around the experts: "
            "%s",
            error,
        )
        return
    torch.cpu._is_amx_tile_supported = lambda: True
