"""The tokenizer of a GGUF file, in the form in which `tokenizers` and transformers read it.

Two kinds: "gpt2", byte-level BPE with its merges, whose way of cutting text is only named
(pre_tokenizers.py); and "llama", SentencePiece's BPE, whose merges follow from the tokens' scores.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kt_kernel.errors import CheckpointError, FeatureUnavailableError
from kt_kernel.gguf.model import GgufModel
from kt_kernel.gguf_model.pre_tokenizers import Merging, require_pre_tokenizer

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

_BYTE_LEVEL, _SENTENCE_PIECE = "gpt2", "llama"
# tokenizer.ggml.token_type
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5
_SPACE = "▁"  # SentencePiece's
# Files of these add the first token unless they say otherwise.
_ADDS_FIRST_TOKEN = ("llama-bpe", "llama3", "llama-v3", "tekken")


@dataclass(frozen=True)
class Vocabulary:
    """What the metadata say of the tokens, with arrays as lists."""

    file: GgufModel
    tokens: list[str]
    kinds: list[int]

    @classmethod
    def of(cls, file: GgufModel) -> Vocabulary:
        """Raises CheckpointError if the file has no tokens."""
        tokens = file.metadata.get("tokenizer.ggml.tokens")
        if tokens is None:
            raise CheckpointError(f"'{file.path}' holds no tokenizer; take a file with one.")
        kinds = file.metadata.get("tokenizer.ggml.token_type")
        kinds = [_NORMAL] * len(tokens) if kinds is None else list(kinds)
        if len(kinds) != len(tokens):
            raise CheckpointError(
                f"'{file.path}' has {len(tokens)} tokens and the kinds of {len(kinds)}; download it again."
            )
        return cls(file, list(tokens), kinds)

    def said(self, key: str, default: Any = None) -> Any:
        """The metadata `tokenizer.ggml.<key>`."""
        return self.file.metadata.get(f"tokenizer.ggml.{key}", default)

    def named(self, role: str) -> str | None:
        """The token of a role such as "bos"; raises CheckpointError if it is none of the tokens."""
        index = self.said(f"{role}_token_id")
        if index is not None and not 0 <= index < len(self.tokens):
            raise CheckpointError(
                f"'{self.file.path}' has {role}_token_id {index}, expected one of {len(self.tokens)} tokens; "
                "download it again."
            )
        return None if index is None else self.tokens[index]

    @property
    def model(self) -> dict[str, int]:
        """Token -> id, without the fillers that pad the vocabulary to a round size."""
        return {
            token: index
            for index, (token, kind) in enumerate(zip(self.tokens, self.kinds, strict=True))
            if kind != _UNUSED
        }

    def added(self) -> Iterator[AddedToken]:
        """Tokens that are found in text before anything else; control tokens are special."""
        from tokenizers import AddedToken

        for token, kind in zip(self.tokens, self.kinds, strict=True):
            if kind in (_CONTROL, _USER_DEFINED):
                yield AddedToken(token, special=kind == _CONTROL, normalized=False)

    @property
    def first_token(self) -> str | None:
        """What every text begins with; None = nothing."""
        usual = self.said("model") == _SENTENCE_PIECE or self.said("pre") in _ADDS_FIRST_TOKEN
        return self.named("bos") if self.said("add_bos_token", usual) else None

    @property
    def last_token(self) -> str | None:
        """What every text ends with; None = nothing, as nearly always."""
        return self.named("eos") if self.said("add_eos_token", default=False) else None


def build_tokenizer(file: GgufModel) -> Tokenizer:
    """The tokenizer of the file; raises a KTError in one sentence if it is of a kind that is not known."""
    vocabulary = Vocabulary.of(file)
    kind = vocabulary.said("model")
    if kind == _BYTE_LEVEL:
        tokenizer = _byte_level(vocabulary)
    elif kind == _SENTENCE_PIECE:
        tokenizer = _sentence_piece(vocabulary)
    else:
        raise FeatureUnavailableError(
            f"not available yet: '{file.path}' has a tokenizer of the kind {kind!r}; known are "
            f"{_BYTE_LEVEL} and {_SENTENCE_PIECE}."
        )
    tokenizer.add_tokens(list(vocabulary.added()))
    _add_first_and_last(tokenizer, vocabulary)
    return tokenizer


def save_tokenizer(file: GgufModel, directory: Path, longest: int) -> None:
    """Write tokenizer.json, tokenizer_config.json and the chat template; `longest`: the model's context.

    Raises a KTError as `build_tokenizer` does.
    """
    build_tokenizer(file).save(str(directory / "tokenizer.json"))
    vocabulary = Vocabulary.of(file)
    roles = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    tokens = {f"{ours}_token": vocabulary.named(theirs) for ours, theirs in roles.items()}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": longest,
        "clean_up_tokenization_spaces": False,
        **{role: token for role, token in tokens.items() if token is not None},
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")
    template = file.metadata.get("tokenizer.chat_template")
    if template is not None:
        (directory / "chat_template.jinja").write_text(template)


def _byte_level(vocabulary: Vocabulary) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    row = require_pre_tokenizer(vocabulary.said("pre"), str(vocabulary.file.path))
    merges = [_merge(merge) for merge in vocabulary.said("merges", ())]
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary.model, merges=merges, ignore_merges=row.merging is Merging.WHOLE, fuse_unk=False
        )
    )
    if row.normal_form:
        tokenizer.normalizer = getattr(normalizers, row.normal_form)()
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in row.patterns]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def _merge(line: str) -> tuple[str, str]:
    left, _, right = line[1:].partition(" ")  # the first character may be a space itself
    return line[0] + left, right


def _sentence_piece(vocabulary: Vocabulary) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers

    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary.model,
            merges=merges_by_score(vocabulary.model, list(vocabulary.said("scores", ()))),
            unk_token=vocabulary.named("unknown") or _unknown(vocabulary),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    begins_with_space = vocabulary.said("add_space_prefix", default=True)
    prefix = [normalizers.Prepend(_SPACE)] if begins_with_space else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", _SPACE)])
    ending = [decoders.Strip(content=" ", left=1)] if begins_with_space else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *ending]
    )
    return tokenizer


def _unknown(vocabulary: Vocabulary) -> str | None:
    tokens = zip(vocabulary.tokens, vocabulary.kinds, strict=True)
    return next((token for token, kind in tokens if kind == _UNKNOWN), None)


def merges_by_score(vocabulary: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Every pair of tokens that makes a token, the best-scored result first: what SentencePiece's BPE does.

    Among pairs with the same result the leftmost split counts first.
    """
    found = []
    for token, index in vocabulary.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary:
                found.append((-scores[index], vocabulary[left], vocabulary[right], left, right))
    found.sort()
    return [(left, right) for *_, left, right in found]


def _add_first_and_last(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    """Into the post-processor, beside the one that the tokenizer has."""
    from tokenizers import processors

    first, last = vocabulary.first_token, vocabulary.last_token
    if first is None and last is None:
        return
    around = [token for token in (first, last) if token is not None]

    def template(*texts: str) -> list[str]:
        parts = []
        for number, text in enumerate(texts):
            parts += [f"{first}:{number}"] * (first is not None)
            parts += [text, *([f"{last}:{number}"] if last is not None else [])]
        return parts

    adding = processors.TemplateProcessing(
        single=template("$A:0"),
        pair=template("$A:0", "$B:1"),
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in dict.fromkeys(around)],
    )
    own = tokenizer.post_processor
    tokenizer.post_processor = adding if own is None else processors.Sequence([own, adding])
