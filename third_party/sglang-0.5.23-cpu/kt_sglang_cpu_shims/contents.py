"""The few names that SGLang really evaluates while it imports triton, torchvision and sgl_kernel."""

import functools

from .stand_in import StandIn

# Sorts below every release, so no "version at least" test succeeds.
VERSION = "0.0.0+kt.stand.in"


def fill(module):
    """Give a fresh stand-in module what its name calls for."""
    if "." not in module.__name__:
        module.__version__ = VERSION
    if module.__name__ == "triton":
        module.jit = jit
        module.autotune = decorator_factory
        module.heuristics = decorator_factory
        module.cdiv = cdiv
        module.next_power_of_2 = next_power_of_2
    elif module.__name__ == "triton.language":
        module.constexpr = constexpr
    elif module.__name__.startswith("sgl_kernel"):
        vars(module).update(functions_of_kt_kernel(module.__name__))


def functions_of_kt_kernel(name):
    """Functions that SGLang imports from sgl_kernel by name and that kt-kernel has."""
    try:
        from kt_kernel.operators.by_name import NAMES
    except ImportError:
        return {}
    return NAMES.get(name, {})


def jit(function=None, **options):
    """`@triton.jit` and `@triton.jit(...)`: the kernel keeps its name and can be imported, not launched."""
    if function is None:
        return jit
    kernel = StandIn(f"triton.jit kernel {function.__module__}.{function.__qualname__}")
    functools.update_wrapper(kernel, function)
    return kernel


def decorator_factory(*args, **kwargs):
    """`@triton.autotune(...)` and `@triton.heuristics(...)`: the kernel passes through."""
    return lambda kernel: kernel


def cdiv(numerator, denominator):
    return -(numerator // -denominator)


def next_power_of_2(n):
    return 1 << max(n - 1, 0).bit_length()


class constexpr:
    """A compile-time constant: `NAME = tl.constexpr(3)` in a module, the annotation `x: tl.constexpr`."""

    def __init__(self, value=None):
        self.value = value
