"""Prompts of a wanted number of tokens, which only the server can count."""

from __future__ import annotations

import random

# Frequent words: most tokenizers have them, with the space before, as one token.
_TEXT = (
    "the of and to in is that for it was on are as with his they at be this from have or by one had not but "
    "what all were when we there can an your which their said if do will each about how up out them then "
    "she many some so these would other into has more her two like him see time could no make than first "
    "been its who now people my made over did down only way find use may water long little very after "
    "words called just where most know get through back much before go good new write our used"
)
_WORDS = _TEXT.split()
_CALIBRATION_WORDS = 200


class Prompts:
    """Texts of random words; the same seed gives the same texts."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._tokens_per_word = 1.0
        self._extra_tokens = 0

    def calibration(self) -> list[str]:
        """Two texts whose numbers of tokens `calibrate` wants to know."""
        return [self._text(_CALIBRATION_WORDS), self._text(2 * _CALIBRATION_WORDS)]

    def calibrate(self, tokens: list[int]) -> None:
        """Learn from the counts of the two texts how many tokens a word has, and what is added to each."""
        short, long = tokens
        self._tokens_per_word = max((long - short) / _CALIBRATION_WORDS, 0.1)
        self._extra_tokens = round(short - self._tokens_per_word * _CALIBRATION_WORDS)

    def text(self, tokens: int) -> str:
        """A text of about that many tokens: with a tokenizer of one token a word, exactly that many."""
        return self._text(max(1, round((tokens - self._extra_tokens) / self._tokens_per_word)))

    def _text(self, words: int) -> str:
        return " ".join(self._random.choices(_WORDS, k=words))
