"""The extension under test, imported without numpy: on some emulated CPUs numpy itself does not start."""

from __future__ import annotations

import importlib.util
import os


def load_extension():
    path = os.environ.get("KT_TEST_EXTENSION")
    if not path:
        from kt_kernel import kt_kernel_ext

        return kt_kernel_ext
    spec = importlib.util.spec_from_file_location("kt_kernel_ext", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ext = load_extension()
