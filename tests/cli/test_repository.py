"""The repository as a reader finds it: formatted, documented as it is, nothing dangling."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from kt_kernel.integrations.sglang.flags import FLAGS

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("doc/*.md"), *ROOT.glob("third_party/*/README.md")])


def test_tree_is_formatted_and_lint_clean():
    done = subprocess.run([ROOT / "scripts/format.sh", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_types_are_right():
    done = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("script", ["support_matrix.py", "extension_stub.py", "option_tables.py"])
def test_what_is_written_by_a_script_is_current(script):
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / script, "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_serving_page_describes_exactly_the_flags_that_exist():
    described = set(re.findall(r"^\| `(--[a-z-]*kt-[a-z-]+)`", (ROOT / "doc/serving.md").read_text(), re.M))
    assert described == {flag.option for flag in FLAGS}
