"""page.html as it is sent: nothing is put into it, and nothing but its own script may run."""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from importlib.resources import files


@functools.cache
def page_text() -> str:
    """The page; the same for every server."""
    return files(__package__).joinpath("page.html").read_text(encoding="utf-8")


def _policy() -> str:
    """Script and style by their hashes, figures from this server, and nothing else."""

    def hashed(tag: str) -> str:
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page_text(), re.DOTALL)
        return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"

    return (
        f"default-src 'none'; script-src {hashed('script')}; style-src {hashed('style')}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


HEADERS = {
    "Content-Security-Policy": _policy(),
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
