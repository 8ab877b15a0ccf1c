"""The --kt-* flags on SGLang's command line, and the errors a user can make there, found before anything is
started.
"""

from __future__ import annotations

import argparse
import os
import socket
from collections.abc import Callable
from typing import Any

from kt_kernel.errors import CheckpointPathError, ConfigurationError, KTError
from kt_kernel.formats.methods import AUTO, require_method
from kt_kernel.integrations.sglang import access
from kt_kernel.integrations.sglang.flags import FLAGS, NO_STATISTICS, STATISTICS, KTFlags, check_flags
from kt_kernel.integrations.sglang.model_file import serve_description

# Attributes on ServerArgs; names with "_" are not configuration fields and travel to the child processes.
FLAGS_ATTRIBUTE = "_kt_flags"
COMMAND_LINE_ATTRIBUTE = "_kt_command_line"

_STOCK_THREADPOOL_COUNT = 2
_MODEL_DESCRIPTIONS = ("config.json", "params.json")


def add_flags(result: None, parser: argparse.ArgumentParser) -> None:
    """After `ServerArgs.add_cli_args(parser)`: the flags that SGLang does not have."""
    known = {option for action in parser._actions for option in action.option_strings}
    group = parser.add_argument_group("kt-kernel")
    for flag in FLAGS:
        if flag.own is not None and flag.option not in known:
            group.add_argument(flag.option, dest=flag.destination, help=flag.help, **flag.own)
    # So that "not given" can be told from SGLang's defaults: one pool per NUMA node and the checkpoint's own
    # format are then the better choices.
    parser.set_defaults(kt_threadpool_count=None, kt_method=None)


def read_flags(original: Callable, cls: type, arguments: argparse.Namespace) -> Any:
    """Around `ServerArgs.from_cli_args(arguments)`: check the flags, and attach them to the result."""
    try:
        serve_description(vars(arguments))
        flags = KTFlags.read(vars(arguments))
        check_flags(flags)
        if flags.weight_path is not None:
            if flags.method != AUTO:
                require_method(flags.method)
            _check_model_path(arguments.model_path)
            _check_port(arguments.host, arguments.port)
            arguments.api_key = arguments.api_key or access.key_of_environment()
    except KTError as error:
        raise SystemExit(f"error: {error}") from None
    if arguments.kt_threadpool_count is None:
        arguments.kt_threadpool_count = _STOCK_THREADPOOL_COUNT
    arguments.kt_method = flags.method
    if flags.weight_path is not None:
        # Ours alone: to SGLang it would mean copies of experts on several devices.
        setattr(arguments, STATISTICS.destination, NO_STATISTICS)
    server_args = original(cls, arguments)
    setattr(server_args, FLAGS_ATTRIBUTE, flags)
    setattr(server_args, COMMAND_LINE_ATTRIBUTE, True)
    return server_args


def _check_model_path(path: str) -> None:
    """A folder must hold a model; a name that is no path is left to SGLang, which may download it."""
    if os.path.isdir(path):
        names = os.listdir(path)
        if not any(name in _MODEL_DESCRIPTIONS or name.endswith(".gguf") for name in names):
            raise CheckpointPathError(
                f"the model folder {path} has no config.json; give --model-path the folder that holds "
                "config.json, "
                "the tokenizer and the weights."
            )
    elif not os.path.exists(path) and path.startswith(("/", ".", "~")):
        raise CheckpointPathError(f"the model folder {path} does not exist; correct --model-path.")


def _check_port(host: str | None, port: int) -> None:
    family, kind, protocol, _, address = socket.getaddrinfo(
        host or "127.0.0.1", port, type=socket.SOCK_STREAM
    )[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            raise ConfigurationError(
                f"the server cannot listen on port {port} of {address[0]} ({error.strerror}); stop the "
                "program that "
                "uses it, or choose another --port."
            ) from None
