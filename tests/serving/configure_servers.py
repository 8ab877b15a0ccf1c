"""Runs in an interpreter of its own: configures servers without starting them.

Standard input: a JSON list of argument lists. Standard output: one JSON line for each, what came of it.
"""

import json
import sys

from sglang.srt.plugins import load_plugins
from sglang.srt.server_args import prepare_server_args


def outcome(arguments: list[str]) -> str:
    try:
        prepare_server_args(arguments).resolve_once()
    except SystemExit as error:
        return str(error.code)
    except Exception as error:
        return f"not one of our errors: {type(error).__name__}: {error}"
    return "accepted"


load_plugins()
for arguments in json.load(sys.stdin):
    print(json.dumps(outcome(arguments)), flush=True)
