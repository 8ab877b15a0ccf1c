r"""How text is cut before BPE, by the name in `tokenizer.ggml.pre`: the table.

A GGUF file names the way and does not carry it. Each row is that of the published tokenizers with the name:
patterns whose matches become pieces one after the other, each on the pieces of the one before. New rows: the
model's tokenizer.json shows its patterns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto

from kt_kernel.errors import CheckpointError

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_SIGNS_OR_SLASHES = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}"
_LOWER = r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_NOT_HAN = r"&&[^\p{Han}]"


def _cased_words(exclusion: str, contraction: str) -> str:
    """Words that begin with capitals and go on in small letters, or are all capitals."""
    before, upper, lower = r"[^\r\n\p{L}\p{N}]?", f"[{_UPPER}{exclusion}]", f"[{_LOWER}{exclusion}]"
    return f"{before}{upper}*{lower}+{contraction}|{before}{upper}+{lower}*{contraction}"


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_QWEN2 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}|{_SIGNS}|{_SPACES}"
_QWEN35 = (
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
_LLAMA3 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1,3}}|{_SIGNS}|{_SPACES}"
_GPT4O = rf"{_cased_words('', _CONTRACTION + '?')}|\p{{N}}{{1,3}}|{_SIGNS_OR_SLASHES}|{_SPACES}"
_TEKKEN = rf"{_cased_words('', '')}|\p{{N}}|{_SIGNS_OR_SLASHES}|{_SPACES}"
_KIMI_K2 = rf"[\p{{Han}}]+|{_cased_words(_NOT_HAN, _CONTRACTION + '?')}|\p{{N}}{{1,3}}|{_SIGNS}|{_SPACES}"
_DEEPSEEK_V3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"
)


class Merging(Enum):
    """What becomes of a piece that is a token as a whole: PIECEWISE, it is merged from its bytes like any
    other; WHOLE, it is that token."""

    PIECEWISE = auto()
    WHOLE = auto()


@dataclass(frozen=True)
class PreTokenizer:
    """`patterns`, in the syntax of Oniguruma; `normal_form`: the Unicode normalisation before them, or ""."""

    patterns: tuple[str, ...]
    merging: Merging = Merging.PIECEWISE
    normal_form: str = ""


_ROWS = {
    ("gpt-2",): PreTokenizer((_GPT2,)),
    ("smollm",): PreTokenizer((r"\p{N}", _GPT2)),
    ("qwen2", "deepseek-r1-qwen"): PreTokenizer((_QWEN2,), normal_form="NFC"),
    ("qwen35",): PreTokenizer((_QWEN35,), normal_form="NFC"),
    ("llama-bpe", "llama3", "llama-v3"): PreTokenizer((_LLAMA3,), Merging.WHOLE),
    ("glm4", "chatglm-bpe"): PreTokenizer((_LLAMA3,)),
    ("gpt-4o", "minimax-m2"): PreTokenizer((_GPT4O,)),
    ("tekken",): PreTokenizer((_TEKKEN,), Merging.WHOLE),
    ("kimi-k2",): PreTokenizer((_KIMI_K2,), Merging.WHOLE),
    ("deepseek-v3",): PreTokenizer((r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK_V3)),
    ("deepseek-llm",): PreTokenizer(
        (
            r"[\r\n]",
            r"\s?[\p{Lu}\p{Ll}\p{Lt}]+",
            r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
            r"\s+$",
            "[一-龥ࠀ-一가-퟿]+",
            r"\p{N}",
        )
    ),
}

PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {name: row for names, row in _ROWS.items() for name in names}


def require_pre_tokenizer(name: str | None, path: str) -> PreTokenizer:
    """The row of a name; raises CheckpointError in one sentence for one that is not in the table."""
    if name not in PRE_TOKENIZERS:
        raise CheckpointError(
            f"the tokenizer of '{path}' cuts text by the rule {name!r}, which is not known here; known are "
            f"{', '.join(PRE_TOKENIZERS)}: give --tokenizer-path the directory of the original model."
        )
    return PRE_TOKENIZERS[name]
