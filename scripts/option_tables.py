"""Writes tables of options into the pages of doc/ from the code that reads the options.

    python scripts/option_tables.py            rewrite them
    python scripts/option_tables.py --check    change nothing; exit status 1 if a page is out of date

Each table stands between two comments: `<!-- NAME: written by scripts/option_tables.py -->` and
`<!-- end of NAME -->`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

DOC = Path(__file__).resolve().parents[1] / "doc"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Markdown."""
    names = list(head)
    lines = [f"| {' | '.join(line)} |" for line in (names, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(names), *lines[1:]])


def flags() -> str:
    """The server's --kt flags; what decides with `frequency` stands below the strategies."""
    from kt_kernel.integrations.sglang.flags import FLAGS, STATISTICS

    def rows() -> Iterator[tuple[str, str, str]]:
        for flag in FLAGS:
            yield f"`{flag.option}`", flag.meaning, flag.default
            if flag.field == "expert_placement_strategy":
                yield f"`{STATISTICS.option}`", STATISTICS.meaning, STATISTICS.default

    return table(("flag", "meaning", "default"), rows())


def variants() -> str:
    """What KT_KERNEL_CPU_VARIANT takes; of one that has all of an earlier one, what it has beside that."""
    from kt_kernel import kt_kernel_ext

    rows: list[tuple[str, str]] = []
    earlier: list[tuple[str, set[str]]] = []
    for variant in kt_kernel_ext.cpu_variants():
        name, needs = variant["name"], list(variant["needs"])
        base = next(((base, has) for base, has in reversed(earlier) if has < set(needs)), None)
        inherited = [f"what `{base[0]}` has"] if base else []
        own = [f"`{feature}`" for feature in needs if base is None or feature not in base[1]]
        rows.append((f"`{name}`", ", ".join(inherited + own)))
        earlier.append((name, set(needs)))
    return table(("variant", "a CPU with at least"), rows)


TABLES: tuple[tuple[str, str, Callable[[], str]], ...] = (
    ("serving.md", "flags", flags),
    ("kernels.md", "variants", variants),
)


def with_table(page: str, name: str, written: str) -> str:
    """`page` with the text between the table's comments replaced; raises ValueError if they are missing."""
    begin, end = f"<!-- {name}: written by scripts/option_tables.py -->", f"<!-- end of {name} -->"
    before, found_begin, rest = page.partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found_begin and found_end):
        raise ValueError(f"the page lacks the lines {begin!r} and {end!r} around its table: put them back")
    return f"{before}{begin}\n\n{written}\n\n{end}{after}"


def main() -> int:
    """Exit status: 1 if --check found an outdated page."""
    outdated = []
    for file, name, written in TABLES:
        path = DOC / file
        page = path.read_text(encoding="utf-8")
        current = with_table(page, name, written())
        if current == page:
            continue
        outdated.append(f"doc/{file} ({name})")
        if "--check" not in sys.argv[1:]:
            path.write_text(current, encoding="utf-8")
    if outdated and "--check" in sys.argv[1:]:
        print(f"out of date: {', '.join(outdated)}; run python scripts/option_tables.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
