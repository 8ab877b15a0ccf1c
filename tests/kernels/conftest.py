"""Kernel tests: what could go wrong inside the native extension, one file per risk; start with harness.py.

    test_yardstick                           the formats in numpy that all others measure with (formats.py)
    test_gguf_types                          a block of a ggml type read as other numbers
    test_exact_on_integers                   a wrong element
    test_every_code_and_scale                a code, a scale or a place that is decoded as another
    test_error_is_small                      lost accuracy
    test_gguf_panels                         the same of types that are kept as panels of integers
    test_gguf_blocks                         and of all types, multiplied in the blocks of the file
    test_result_depends_on_the_token_alone   batch, threads, pools or history change bits
    test_stray_reads_and_writes              memory beside the buffers
    test_special_values                      NaN, Inf, denormals, zeros
    test_swiglu                              activation and its variants
    test_training                            a wrong gradient, of any format
    test_queue, test_idle_threads            order, errors, threads, lifetimes
    test_write_expert                        experts given back to a device in their checkpoint's layout
    test_engine_stats                        what the engine says of its own work
    test_bad_arguments, test_bad_weights     everything a caller can get wrong
    test_device_stream                       calls on a (fake) device stream, run or replayed
    test_device_signals, test_mailbox        replayed calls that meet the device through memory operations
    test_device_headers                      functions of a device runtime called as they are declared
    test_graph_lifetimes                     what a graph holds, and for how long
    test_instruction_leaks                   machine code that does not belong in its file
    test_every_cpu_variant, test_old_cpus    those on arithmetic again as other CPUs, capped or emulated
    test_amx_counts                          tile loads, counted in the machine code
    test_amx_instructions                    the AMX that a CPU without it gets there (trapped_amx.py)

What could not run on this machine, and why, is listed at the end of the test run.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import trapped_amx
from formats import SMALL_SWEEP


@pytest.fixture(scope="session")
def trapped(tmp_path_factory) -> dict[str, str]:
    """Variables of a process with the AMX of trapped_amx.py; skips where there is none, or a CPU's own."""
    if reason := trapped_amx.not_here():
        pytest.skip(reason)
    return trapped_amx.environment(tmp_path_factory.mktemp("trapped_amx"))


def pytest_collection_modifyitems(items):
    """An emulator needs a second or more for a test, so of the small sweep it gets two of five.

    Formats, methods and shapes come in multiples of 2 and 3: with a period of 5 each of them stays.
    """
    if SMALL_SWEEP:
        ours = [item for item in items if item.path.parent == Path(__file__).parent]
        left_out = {item for place, item in enumerate(ours) if place % 5 >= 2}
        items[:] = [item for item in items if item not in left_out]
