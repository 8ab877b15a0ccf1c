"""The tokenizer out of a GGUF file cuts text as the published one does, and is read by transformers."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import sentencepiece
from gguf_published import TOKENIZER
from gguf_writing import write
from tokenizers import Regex, pre_tokenizers
from transformers import AutoTokenizer, Qwen2Tokenizer

from kt_kernel.demo.gguf_source import SourceModel, find_source
from kt_kernel.demo.tokenizer import build_tokenizer as build_demo_tokenizer
from kt_kernel.errors import CheckpointError, FeatureUnavailableError
from kt_kernel.gguf.model import open_gguf
from kt_kernel.gguf_model.pre_tokenizers import PRE_TOKENIZERS
from kt_kernel.gguf_model.tokenizer import build_tokenizer, save_tokenizer

TEXTS = [
    "The history of science, 1687: Isaac Newton's Principia.",
    "naïve 東京 カタカナ 🙂👨‍👩‍👧 Ⅷ ½ ١٢٣ é\u0301",
    "\n\n\tdef f(x):\r\n    return x ** 2  # 1234567   \n",
    "I'll WE'VE don't 'Twas  the   spaces",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "not a token: <|im_|> <|endoftext|",
    "",
]


def saved(directory: Path, **metadata: object):
    """transformers' tokenizer of a file with these metadata; None takes one away."""
    keys = {key: value for key, value in {**TOKENIZER, **metadata}.items() if value is not None}
    save_tokenizer(open_gguf(write(directory / "t.gguf", "qwen3moe", keys, [])), directory, 1024)
    return AutoTokenizer.from_pretrained(directory)


def test_another_projects_file_gives_the_demos_tokenizer(tmp_path):
    path = find_source().path
    save_tokenizer(open_gguf(path), tmp_path, 8192)
    ours, demo = AutoTokenizer.from_pretrained(tmp_path), build_demo_tokenizer(SourceModel(path))
    for text in TEXTS:
        assert ours(text).input_ids == demo(text).input_ids, text
        assert ours.decode(ours(text).input_ids) == text
    for role in ("bos_token", "eos_token", "pad_token", "unk_token", "model_max_length"):
        assert getattr(ours, role) == getattr(demo, role), role
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    assert ours.apply_chat_template(chat, tokenize=False) == demo.apply_chat_template(chat, tokenize=False)
    assert ours.decode([1, 2, 28], skip_special_tokens=True) == demo.decode([28])


# The published rules, on what tells them apart.
CUTS = {
    "gpt-2": ("a1234 I'LL x\n\n y", ["a", "1234", " I", "'", "LL", " x", "\n\n", " y"]),
    "smollm": ("a12 I'll", ["a", "1", "2", " I", "'ll"]),
    "qwen2": ("a12 I'LL x!\n\n y", ["a", "1", "2", " I", "'LL", " x", "!\n\n", " y"]),
    "qwen35": ("e\u0301t\u0301 12", ["e\u0301t\u0301", " ", "1", "2"]),
    "llama-bpe": ("a12345 I'LL", ["a", "123", "45", " I", "'LL"]),
    "glm4": ("a12345 I'LL", ["a", "123", "45", " I", "'LL"]),
    "gpt-4o": ("HELLOworld I'LL a/b//\n1234", ["HELLOworld", " I'LL", " a", "/b", "//\n", "123", "4"]),
    "minimax-m2": ("HelloWorld 1234", ["Hello", "World", " ", "123", "4"]),
    "tekken": ("HelloWorld I'll 12", ["Hello", "World", " I", "'ll", " ", "1", "2"]),
    "kimi-k2": ("ab東京cd 1234 I'll", ["ab", "東京", "cd", " ", "123", "4", " I'll"]),
    "deepseek-v3": ("ab東京 1234 (x) .py", ["ab", "東京", " ", "123", "4", " (", "x", ")", " .", "py"]),
    "deepseek-llm": ("ab12 東京\n(x)", ["ab", "1", "2", " ", "東京", "\n", "(", "x", ")"]),
}


@pytest.mark.parametrize("name", CUTS)
def test_each_rule_cuts_text_as_the_published_one(name):
    text, pieces = CUTS[name]
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PRE_TOKENIZERS[name].patterns]
    cut = pre_tokenizers.Sequence(splits).pre_tokenize_str(text)
    assert [piece for piece, _ in cut] == pieces
    assert "".join(pieces) == text


def test_the_qwen_rule_is_that_of_transformers():
    theirs = Qwen2Tokenizer(vocab={"a": 0}, merges=[]).backend_tokenizer
    row = PRE_TOKENIZERS["qwen2"]
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in row.patterns]
    ours = pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(False, use_regex=False)])
    for text in TEXTS:
        assert ours.pre_tokenize_str(text) == theirs.pre_tokenizer.pre_tokenize_str(text), text
    assert type(theirs.normalizer).__name__ == row.normal_form


def test_a_piece_that_is_a_token_is_taken_whole_where_the_rule_says_so(tmp_path):
    """ "hex" is in the vocabulary, and no merge leads to it."""
    tokens = list(TOKENIZER["tokenizer.ggml.tokens"])
    tokens[-1] = "hex"
    kinds = [*TOKENIZER["tokenizer.ggml.token_type"][:-1], 1]
    ids = {}
    for rule in ("llama-bpe", "qwen2"):
        file = write(
            tmp_path / f"{rule}.gguf",
            "qwen3moe",
            TOKENIZER
            | {
                "tokenizer.ggml.pre": rule,
                "tokenizer.ggml.tokens": tokens,
                "tokenizer.ggml.token_type": kinds,
            },
            [],
        )
        ids[rule] = build_tokenizer(open_gguf(file)).encode("hex").tokens
    assert ids == {"llama-bpe": ["hex"], "qwen2": ["he", "x"]}


def test_the_first_token_is_added_where_the_file_or_its_rule_says_so(tmp_path):
    first = TOKENIZER["tokenizer.ggml.bos_token_id"]

    def begins_with_it(name: str, **metadata: object) -> bool:
        (tmp_path / name).mkdir()
        return saved(tmp_path / name, **metadata)("x").input_ids[0] == first

    assert not begins_with_it("no")
    assert begins_with_it("said", **{"tokenizer.ggml.add_bos_token": True})
    assert begins_with_it("rule", **{"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.add_bos_token": None})
    assert not begins_with_it("default", **{"tokenizer.ggml.add_bos_token": None})


def test_fillers_of_the_vocabulary_are_no_tokens(tmp_path):
    tokenizer = saved(tmp_path)
    filler = TOKENIZER["tokenizer.ggml.tokens"][-1]
    assert len(tokenizer(filler).input_ids) > 1
    assert len(tokenizer) < len(TOKENIZER["tokenizer.ggml.tokens"])


# ---- SentencePiece --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sentence_piece() -> sentencepiece.SentencePieceProcessor:
    """A small model of the kind that Mixtral has, trained on this file."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(Path(__file__).read_text(encoding="utf-8").splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=600,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        num_threads=1,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def in_file(model: sentencepiece.SentencePieceProcessor) -> dict[str, object]:
    ids = range(model.vocab_size())
    kinds = [
        2 if model.is_unknown(i) else 3 if model.is_control(i) else 6 if model.is_byte(i) else 1 for i in ids
    ]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": None,
        "tokenizer.ggml.tokens": [model.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": [float(model.get_score(i)) for i in ids],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": None,
        "tokenizer.ggml.bos_token_id": model.bos_id(),
        "tokenizer.ggml.eos_token_id": model.eos_id(),
        "tokenizer.ggml.unknown_token_id": model.unk_id(),
        "tokenizer.ggml.padding_token_id": None,
        "tokenizer.ggml.add_bos_token": None,
    }


def test_sentence_pieces_are_those_of_its_own_library(sentence_piece, tmp_path):
    tokenizer = saved(tmp_path, **in_file(sentence_piece))
    texts = [*TEXTS, *Path(__file__).read_text(encoding="utf-8").splitlines()[:80], " leading", "x  y"]
    for text in texts:
        ids = tokenizer(text).input_ids
        assert ids[0] == sentence_piece.bos_id()
        assert ids[1:] == sentence_piece.encode(text), text
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


# ---- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metadata", "error", "sentence"),
    [
        ({"tokenizer.ggml.pre": "viking"}, CheckpointError, "cuts text by the rule 'viking', which is not"),
        ({"tokenizer.ggml.pre": None}, CheckpointError, "cuts text by the rule None"),
        ({"tokenizer.ggml.model": "bert"}, FeatureUnavailableError, "of the kind 'bert'; known are gpt2"),
        ({"tokenizer.ggml.tokens": None}, CheckpointError, "holds no tokenizer"),
        ({"tokenizer.ggml.token_type": [1, 1]}, CheckpointError, "320 tokens and the kinds of 2"),
        ({"tokenizer.ggml.eos_token_id": 320}, CheckpointError, "eos_token_id 320, expected one of 320"),
    ],
)
def test_a_tokenizer_that_cannot_be_built_is_named(metadata, error, sentence, tmp_path):
    with pytest.raises(error, match=sentence) as raised:
        saved(tmp_path, **metadata)
    assert "t.gguf" in str(raised.value)
