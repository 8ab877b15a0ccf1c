"""`sglang.Engine(kt_numa_nodes=[0], ...)`: the flags SGLang has no fields for, as keyword arguments."""

from __future__ import annotations

import sys
from typing import Any

from kt_kernel.integrations.sglang.cli import FLAGS_ATTRIBUTE
from kt_kernel.integrations.sglang.flags import FLAGS, STATISTICS, KTFlags
from kt_kernel.integrations.sglang.model_file import serve_description


def install() -> None:
    """Make `Engine` build its ServerArgs through us. A program without an Engine has nothing to install into.

    Not one of SGLang's hooks: `Engine.__init__` loads the plug-ins itself, too late for a hook on
    `Engine.__init__`, and `Engine.server_args_class` is the ServerArgs class, which a hook would replace
    everywhere.
    """
    module = sys.modules.get("sglang.srt.entrypoints.engine")
    if module is not None:
        module.Engine.server_args_class = _ServerArgsBuilder(module.Engine.server_args_class)


class _ServerArgsBuilder:
    """Calls like the class it stands for, and takes our flags out of the arguments first."""

    def __init__(self, server_args_class: type) -> None:
        self._server_args_class = server_args_class

    def __call__(self, **arguments: Any) -> Any:
        serve_description(arguments)
        flags = KTFlags.read(arguments)
        for flag in FLAGS:
            if flag.own is not None:
                arguments.pop(flag.destination, None)
        if flags.weight_path is not None:
            arguments.pop(STATISTICS.destination, None)
        server_args = self._server_args_class(**arguments)
        setattr(server_args, FLAGS_ATTRIBUTE, flags)
        return server_args

    def __getattr__(self, name: str) -> Any:
        return getattr(self._server_args_class, name)
