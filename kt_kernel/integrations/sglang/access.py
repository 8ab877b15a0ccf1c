"""Who may use a server: its key comes from the environment or a file and is shown nowhere; web pages may
not ask.

Stock SGLang 0.5.23 takes the key from the command line alone, which everybody on the machine can read,
writes it into its log and tells it in /server_info, and lets every web page that somebody on the machine
visits ask the server.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kt_kernel.errors import ConfigurationError
from kt_kernel.integrations.sglang.settings import SETTINGS_ATTRIBUTE
from kt_kernel.key_names import KEY, KEY_FILE

ORIGINS = "KT_ALLOW_ORIGINS"
_SECRETS = ("api_key", "admin_api_key")
_HIDDEN = "<redacted>"
_ON_COMMAND_LINE = re.compile(r"(--(?:admin-)?api-key[= ])('[^']*'|\S+)")


def key_of_environment() -> str | None:
    """The key, None if there is none.

    Raises ConfigurationError if the file is not to be read, or holds none.
    """
    path = os.environ.get(KEY_FILE)
    if not path:
        return os.environ.get(KEY) or None
    try:
        key = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(
            f"the file of the key, {path} ({KEY_FILE}), cannot be read: {error}."
        ) from None
    if not key or "\n" in key:
        raise ConfigurationError(
            f"the file of the key, {path} ({KEY_FILE}), has no line, or several; expected one."
        )
    return key


def hide(shown: Any, *arguments: Any, **options: Any) -> Any:
    """After `redact_watermark_secrets`, which calls itself for all parts of what is shown."""
    if not isinstance(shown, dict) or not any(shown.get(name) for name in _SECRETS):
        return shown
    return shown | {name: _HIDDEN for name in _SECRETS if shown.get(name)}


def hide_on_command_line(command: str, argv: Sequence[str], *arguments: Any) -> str:
    """After `redact_watermark_command_line`."""
    return _ON_COMMAND_LINE.sub(rf"\1{_HIDDEN}", command)


def close_to_web_pages(server_args: Any, *arguments: Any, **options: Any) -> None:
    """Before `_setup_and_run_http_server`: only the origins of KT_ALLOW_ORIGINS may ask, by default none."""
    if getattr(server_args, SETTINGS_ATTRIBUTE, None) is None:
        return
    from fastapi.middleware.cors import CORSMiddleware
    from sglang.srt.entrypoints.http_server import app

    app.user_middleware[:] = [entry for entry in app.user_middleware if entry.cls is not CORSMiddleware]
    origins = [origin.strip() for origin in os.environ.get(ORIGINS, "").split(",") if origin.strip()]
    if origins:
        app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"])
