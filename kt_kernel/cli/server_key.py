"""The key of a server that `kt run` starts: not on its command line, which everybody on the machine can
read.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from kt_kernel.key_names import KEY, KEY_FILE
from kt_kernel.planning.user_options import last_value, matches

FLAG, FILE_FLAG = "--api-key", "--api-key-file"


def without_key(options: list[str]) -> tuple[list[str], dict[str, str]]:
    """The options without those that give the key, and the environment that gives it instead."""
    environment = {}
    if (path := last_value(options, FILE_FLAG)) is not None:
        environment = {KEY_FILE: os.path.abspath(path)}
    elif (key := last_value(options, FLAG)) is not None:
        environment = {KEY: key, KEY_FILE: ""}
    kept, skip = [], False
    for option in options:
        if skip or any(matches(option, flag) for flag in (FLAG, FILE_FLAG)):
            skip = not skip and "=" not in option
        else:
            kept.append(option)
    return kept, environment


def has_key(environment: Mapping[str, str]) -> bool:
    """Will a server with this environment ask for a key?"""
    return bool(environment.get(KEY) or environment.get(KEY_FILE))
