"""SmolLM2's tokenizer and chat template, rebuilt from GGUF metadata.

The file carries the byte-level BPE vocabulary, the merges, the kind of every token and the chat
template.  The only thing it names rather than carries is the way text is cut before BPE
("smollm"): every digit on its own, then GPT-2's pattern.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kt_kernel.demo.gguf_source import REINSTALL_HINT, DemoError, SourceModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_CONTROL_TOKEN = 3  # GGUF token type of markers such as <|im_end|>, which text can never produce
_EXPECTED = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm"}


def build_tokenizer(source: SourceModel) -> PreTrainedTokenizerFast:
    """The tokenizer, ready to be saved beside the weights.

    Raises:
        DemoError: the file describes another kind of tokenizer.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    for key, expected in _EXPECTED.items():
        if (seen := source.metadata(key)) != expected:
            raise DemoError(f"{key} is {seen!r}, expected {expected!r}: {REINSTALL_HINT}")

    tokens: list[str] = source.metadata("tokenizer.ggml.tokens")
    kinds: list[int] = source.metadata("tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ", 1)) for merge in source.metadata("tokenizer.ggml.merges")]

    def named(role: str) -> str:
        return tokens[source.metadata(f"tokenizer.ggml.{role}_token_id")]

    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == _CONTROL_TOKEN
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=named("bos"),
        eos_token=named("eos"),
        unk_token=named("unknown"),
        pad_token=named("padding"),
        chat_template=source.metadata("tokenizer.chat_template"),
        model_max_length=source.dimensions.context,
        clean_up_tokenization_spaces=False,
    )
