"""The commands that the documentation shows, one by one."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("doc/*.md"), *ROOT.glob("third_party/*/README.md")])
PROGRAMS = ("kt", "python", "pytest", "pip", "./install.sh", "scripts/format.sh", "curl")


@dataclass(frozen=True)
class Command:
    """Where it stands, and its words without variables in front, comments and the path of the environment."""

    place: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.place}: {shlex.join(self.words)}"

    @property
    def program(self) -> str:
        """The first word; of `python FILE.py` and `python -m MODULE` the file or module as well."""
        if self.words[0] != "python" or len(self.words) == 1:
            return self.words[0]
        return " ".join(self.words[: 3 if self.words[1] == "-m" else 2])

    @property
    def options(self) -> list[str]:
        """Words that begin with a dash and are not numbers, without their values."""
        words = [word.partition("=")[0] for word in self.words[1:]]
        return [word for word in words if re.fullmatch(r"--?[a-zA-Z][\w-]*", word) and word != "-m"]

    @property
    def has_a_placeholder(self) -> bool:
        """Is one of the words for the reader to fill in: MODEL, /models/..., [OPTIONS], ...?"""
        return any(re.search(r"[A-Z]{3}|^/models|…|\.\.\.|^\[", word) for word in self.words)


def commands_of(page: Path) -> Iterator[Command]:
    """Those of code blocks, and spans of code that begin with a program's name and go on."""
    name, lines = str(page.relative_to(ROOT)), page.read_text(encoding="utf-8").split("\n")
    number = 0
    while number < len(lines):
        line = lines[number]
        if line.startswith("```"):
            end = next(i for i in range(number + 1, len(lines)) if lines[i].startswith("```"))
            if not line.startswith("```python"):
                yield from of_block(f"{name}:{number + 2}", lines[number + 1 : end])
            number = end
        elif line.startswith("    "):
            block = [line]
            while number + len(block) < len(lines) and lines[number + len(block)].startswith("    "):
                block.append(lines[number + len(block)])
            yield from of_block(f"{name}:{number + 1}", block)
            number += len(block) - 1
        else:
            for span in re.findall(r"`([^`]+)`", line):
                for command in of_block(f"{name}:{number + 1}", [span]):
                    if len(command.words) > 1:
                        yield command
        number += 1


def of_block(place: str, lines: list[str]) -> Iterator[Command]:
    """Commands of the lines of a shell: joined where they go on, cut where another command begins."""
    text = "\n".join(lines).replace("\\\n", " ").replace("…", "")
    for part in re.split(r"\n|;|&&|\|(?!-)|\bdo\b", text):
        try:
            words = shlex.split(part, comments=True)
        except ValueError:  # a quote that is closed in a later line
            words = part.split()
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            words.pop(0)
        if words:
            words[0] = words[0].removeprefix("$").removeprefix(".venv/bin/").removeprefix("./.venv/bin/")
        if words and words[0] in PROGRAMS:
            yield Command(place, tuple(words))
