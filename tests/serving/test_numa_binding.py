"""SGLang must not bind the scheduler, and with it the engine's threads and buffers, to one NUMA node."""

from __future__ import annotations

import json

from test_plugin import run

# A machine on which SGLang would bind: numactl, several nodes, and the GPU on node 1.
PROGRAM = """
import json, logging, os, sys
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.server_args import prepare_server_args
from sglang.srt.utils import numa_utils
numa_utils._is_numa_available = lambda: True
numa_utils._query_numa_node_for_gpu = lambda gpu: [1]
said = []
class Keep(logging.Handler):
    def emit(self, record):
        said.append(record.getMessage())
logger = logging.getLogger("kt_kernel.integrations.sglang.numa_binding")
logger.addHandler(Keep())
logger.setLevel(logging.INFO)
for environment, arguments in json.loads(sys.argv[1]):
    for name in ("SGLANG_AUTO_NUMA_BIND", "SGLANG_NUMA_BIND_V2"):
        os.environ.pop(name, None)
    os.environ.update(environment)
    said.clear()
    server_args = prepare_server_args(arguments)
    server_args.resolve_once()
    print(json.dumps([numa_utils.get_numa_node_if_available(server_args, 0), said]))
"""

WITHOUT_EXPERTS = ["no CPU experts"]

# (environment, options, the node SGLang then binds to, do we say anything)
CASES = (
    ({}, [], None, True),
    ({"SGLANG_AUTO_NUMA_BIND": "1"}, [], 1, False),
    ({"SGLANG_AUTO_NUMA_BIND": "0"}, [], None, False),
    ({"SGLANG_NUMA_BIND_V2": "1"}, [], 1, False),
    ({"SGLANG_NUMA_BIND_V2": "0"}, [], None, True),
    ({}, ["--numa-node", "0"], 0, False),
    ({}, WITHOUT_EXPERTS, 1, False),
)


def test_only_a_user_who_asks_for_it_is_bound_to_one_node(tiny_checkpoint):
    model = str(tiny_checkpoint("qwen3_moe"))
    stock = ["--model", model, "--port", "0"]
    servers = [
        (environment, stock if options is WITHOUT_EXPERTS else [*stock, "--kt-weight-path", model, *options])
        for environment, options, _, _ in CASES
    ]
    outcomes = [json.loads(line) for line in run("-c", PROGRAM, json.dumps(servers))[-len(CASES) :]]
    for (environment, options, node, speaks), (bound_to, said) in zip(CASES, outcomes, strict=True):
        assert bound_to == node, (environment, options)
        assert len(said) == speaks, (environment, options, said)
        assert "\n" not in "".join(said)
