"""The published names of methods for mode "sft", and what they are here."""

from __future__ import annotations

from dataclasses import dataclass

_SUFFIX, _SKIP_LORA = "_SFT", "_SkipLoRA"
_METHODS = {
    "AMXBF16": "BF16",
    "INT8": "AMXINT8",
    "AMXFP8": "FP8",
    "AMXINT4_KGroup": "RAWINT4",
}


@dataclass(frozen=True)
class SftMethod:
    """`method`: of KTMoEWrapper. `trains_lora`: are there gradients of the LoRA?"""

    method: str | None
    trains_lora: bool = True


def sft_method(name: str | None) -> SftMethod:
    """Of a published name such as AMXBF16_SFT or INT8_SFT_SkipLoRA; others, and None, stay as they are."""
    if name is None or _SUFFIX not in name:
        return SftMethod(name)
    base = name.removesuffix(_SKIP_LORA).removesuffix(_SUFFIX)
    return SftMethod(_METHODS.get(base, base), trains_lora=not name.endswith(_SKIP_LORA))
