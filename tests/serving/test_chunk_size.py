"""The chunk size of a server that streams experts: ours where the user left it open, the user's otherwise."""

from __future__ import annotations

import json

import pytest
import tiny_models
from test_plugin import run

from kt_kernel.integrations.sglang.chunk_size import static_share

# A device with as much memory as the first argument says, in MiB.
PROGRAM = """
import json, logging, sys
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.arg_groups import memory_hook
from sglang.srt.arg_groups.overrides import resolving_view
from sglang.srt.server_args import prepare_server_args
from sglang.srt.utils import common
said = []
class Keep(logging.Handler):
    def emit(self, record):
        said.append(record.getMessage())
logger = logging.getLogger("kt_kernel.integrations.sglang.chunk_size")
logger.addHandler(Keep())
logger.setLevel(logging.INFO)
for memory, arguments in json.loads(sys.argv[1]):
    memory_hook.get_device_memory_capacity = common.get_device_memory_capacity = lambda device: memory
    said.clear()
    server_args = prepare_server_args(arguments)
    try:
        server_args.resolve_once()
    except SystemExit as error:
        print(json.dumps({"error": str(error)}))
        continue
    options = resolving_view(server_args)
    print(json.dumps({
        "chunk": options.chunked_prefill_size,
        "static": options.mem_fraction_static,
        "most tokens": server_args._kt_settings.max_tokens,
        "said": said,
    }))
"""

STREAMS = ["--kt-gpu-prefill-token-threshold", "512"]
# name -> MiB of device memory, options
CASES = {
    "stock": (24000, []),
    "streams": (24000, STREAMS),
    "streams in little memory": (150, STREAMS),
    "streams in a lot of memory": (24000, [*STREAMS, "--mem-fraction-static", "0.9"]),
    "no memory for activations": (24000, [*STREAMS, "--mem-fraction-static", "0.9999"]),
    "chosen by the user": (24000, [*STREAMS, "--chunked-prefill-size", "1024"]),
    "high threshold": (24000, ["--kt-gpu-prefill-token-threshold", "6000"]),
    "high threshold, little memory": (150, ["--kt-gpu-prefill-token-threshold", "60000"]),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, dict]:
    path = tmp_path_factory.mktemp("long") / "model"
    model = str(tiny_models.build("qwen3_moe", path, max_position_embeddings=40960))
    common = ["--model", model, "--port", "0", "--kt-weight-path", model, "--max-running-requests", "4"]
    servers = [(memory, [*common, *options]) for memory, options in CASES.values()]
    lines = run("-c", PROGRAM, json.dumps(servers))[-len(CASES) :]
    return dict(zip(CASES, map(json.loads, lines), strict=True))


def test_a_server_that_streams_gets_larger_chunks_and_says_why(outcomes):
    stock, streams = outcomes["stock"], outcomes["streams"]
    assert stock["said"] == []
    assert streams["chunk"] > stock["chunk"]
    (line,) = streams["said"]
    assert line.startswith(f"--chunked-prefill-size is not given: {streams['chunk']}, because")
    assert f"with SGLang's {stock['chunk']}" in line
    assert "assuming 25 GB/s to the device" in line
    assert streams["most tokens"] == streams["chunk"]


def test_an_explicit_choice_wins_silently(outcomes):
    chosen = outcomes["chosen by the user"]
    assert (chosen["chunk"], chosen["most tokens"], chosen["said"]) == (1024, 1024, [])


def test_memory_bounds_the_chunk(outcomes):
    assert outcomes["streams in little memory"]["chunk"] < outcomes["streams"]["chunk"]


def test_activations_beyond_what_sglang_sets_aside_come_out_of_the_static_share():
    assert static_share(0.8, device_bytes=100e9, set_aside=6e9, needed=16e9) == 0.7
    assert static_share(0.8, device_bytes=100e9, set_aside=6e9, needed=5e9) == 0.8


def test_a_share_of_memory_that_the_user_chose_is_kept_and_bounds_the_chunk(outcomes):
    kept = outcomes["streams in a lot of memory"]
    assert (kept["static"], kept["chunk"]) == (0.9, outcomes["streams"]["chunk"])
    tight = outcomes["no memory for activations"]
    assert (tight["static"], tight["chunk"]) == (0.9999, outcomes["stock"]["chunk"])


def test_a_threshold_above_sglangs_chunk_is_reached_where_memory_allows(outcomes):
    assert outcomes["high threshold"]["chunk"] >= 6000
    error = outcomes["high threshold, little memory"]["error"]
    assert "--kt-gpu-prefill-token-threshold is 60000, but no chunk has more than" in error
