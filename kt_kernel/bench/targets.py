"""What a row should reach, as a share of one of the machine's limits."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """At least `share` of `limit`: "read", "peak" or "roof" (`kt_kernel.bench.measure.Row`)."""

    limit: str
    share: float


FOUR_BIT_WITH_SCALES = (
    5.0  # the most bits per weight that a 4-bit format takes: AMXINT4, a float32 per 32 columns
)

_FEW, _SOME, _MANY = 1, 16, 1024


def target_for(
    kernel: str, bits_per_weight: float, shape: str, tokens: int, activations: str
) -> Target | None:
    """The target of a reference shape with 1, 16 or 1024 tokens; None for all others.

    One token can only be as fast as the weights are read, 1024 only as fast as they are multiplied; with 16
    it depends on the machine, and the slower limit counts. The AVX2 kernels decode in more steps and sum in
    registers half as wide.
    """
    is_avx2 = kernel.endswith(".avx2")
    is_four_bit = bits_per_weight <= FOUR_BIT_WITH_SCALES
    if activations == "int8":
        return _int8_target(kernel, bits_per_weight, shape, tokens)
    if tokens == _FEW:
        if is_avx2:
            return Target("read", 0.35 if is_four_bit else 0.50)
        return Target("read", 0.70 if is_four_bit else 0.75)
    if tokens == _SOME and shape == "S" and not is_avx2:
        return Target("roof", 0.60)
    if tokens == _MANY:
        if is_avx2:
            return Target("peak", 0.55)
        return Target("peak", 0.75 if shape == "L" else 0.60)
    return None


_GGUF_READ = {"Q8_0": 0.75, **dict.fromkeys(("Q4_0", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "MXFP4"), 0.70)}


def gguf_target(kernel: str, ggml_type: str, shape: str, tokens: int) -> Target | None:
    """The target of the types that people use most, with int8 activations; None for all others."""
    if "_int8." not in kernel or ggml_type not in _GGUF_READ:
        return None
    if tokens == _FEW:
        return Target("read", 0.60 if kernel.endswith(".avx2") else _GGUF_READ[ggml_type])
    if tokens == _MANY:
        return Target("peak", 0.65 if shape == "L" else 0.50)
    return None


def _int8_target(kernel: str, bits_per_weight: float, shape: str, tokens: int) -> Target | None:
    """Integers are read as they are, so with one token only unpacking nibbles without VNNI costs anything."""
    if tokens == _FEW:
        needs_no_unpacking = kernel.endswith(("_vnni", ".amx")) or bits_per_weight > FOUR_BIT_WITH_SCALES
        return Target("read", 0.80 if needs_no_unpacking else 0.70)
    if tokens == _SOME and shape == "S":
        return Target("roof", 0.65)
    if tokens == _MANY:
        on_s, on_l = (0.50, 0.60) if kernel.endswith(".avx2") else (0.55, 0.70)
        return Target("peak", on_l if shape == "L" else on_s)
    return None
