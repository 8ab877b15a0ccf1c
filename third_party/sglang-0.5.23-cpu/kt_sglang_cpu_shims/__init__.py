"""Lets stock SGLang 0.5.23 be imported on a machine without a GPU.

SGLang imports triton, torchvision and sgl_kernel before it loads any plug-in. On a CPU-only machine the
first is 700 MB of dead weight, the second does not load beside a CPU build of torch, and the third has no
CPU wheel. Nothing of them runs there, so stand-ins that exist, and say so clearly when something does call
them, are enough.

How it starts: `kt_sglang_cpu_shims.pth` makes every interpreter of the environment call
`on_interpreter_start()`. That function must stay tiny: it imports nothing and looks at the command line. If
the command is SGLang's, or as soon as another program (a script with `sglang.Engine`) imports something of
SGLang, and the machine has no GPU device node, it sets the environment SGLang needs on a CPU and appends one
finder to the END of `sys.meta_path`: a real triton, torchvision or sgl_kernel always wins.

The environment variable `KT_SGLANG_CPU_SHIMS` overrides the decision: `1` = on (a CPU server on a machine
that has a GPU), `0` = off. It is set to `1` on activation, so that the scheduler and detokenizer processes,
which multiprocessing starts with a command line of its own, follow their parent. `KT_CPU_OPERATORS` (`on`,
`off`) does the same for kt-kernel's CPU operators (gate.py).
"""

import os
import sys

SWITCH = "KT_SGLANG_CPU_SHIMS"

GPU_DEVICE_NODES = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/kfd", "/dev/dxg", "/dev/davinci_manager")

# setdefault, never overwritten: what the user exported counts.
CPU_ENVIRONMENT = {
    "SGLANG_USE_CPU_ENGINE": "1",
    # torch.compile would look for triton (finding the stand-in) and a C++ compiler; GLM4 and DeepSeek-V3
    # hang at warm-up.
    "TORCHDYNAMO_DISABLE": "1",
}

_OPTIONS_WITH_A_VALUE = ("-X", "-W", "--check-hash-based-pycs")


def is_sglang_command(argv):
    """True for `python … -m sglang[.x] …` and `python … /any/bin/sglang …`; argv is `sys.orig_argv`."""
    arguments = iter(argv[1:])
    for argument in arguments:
        if argument in _OPTIONS_WITH_A_VALUE:
            next(arguments, None)
        elif argument.startswith("-m"):
            module = argument[2:] or next(arguments, "")
            return module.partition(".")[0] == "sglang"
        elif argument.startswith("-c"):
            return False
        elif not argument.startswith("-"):
            return os.path.basename(argument) == "sglang"
    return False


def has_gpu_device_node():
    return any(os.path.exists(node) for node in GPU_DEVICE_NODES)


def on_interpreter_start():
    switch = os.environ.get(SWITCH)
    if switch == "1":
        activate()
    elif switch is None and not is_sglang_command(sys.orig_argv):
        sys.meta_path.insert(0, FirstImport)
    elif switch is None and not has_gpu_device_node():
        activate()


class FirstImport:
    """First entry of `sys.meta_path` of any other program until it imports a module below `sglang`.

    Not at `sglang` itself: that is also what programs ask for which only want to know whether it is there.
    """

    @staticmethod
    def find_spec(fullname, path=None, target=None):
        if not fullname.startswith("sglang."):
            return None
        sys.meta_path.remove(FirstImport)
        if not has_gpu_device_node():
            activate()
        return None


def activate():
    """Turn the stand-ins on in this process and in the processes it starts. Calling it again changes
    nothing.
    """
    from . import gate
    from .finder import StandInFinder

    os.environ[SWITCH] = "1"
    # The processes that multiprocessing starts have a command line of its own.
    os.environ[gate.SWITCH] = gate.ON if gate.wanted(sys.orig_argv, os.environ) else gate.OFF
    if os.environ[gate.SWITCH] == gate.ON and gate.GateOpener not in sys.meta_path:
        sys.meta_path.insert(0, gate.GateOpener)
    for name, value in CPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if StandInFinder not in sys.meta_path:
        sys.meta_path.append(StandInFinder)
