"""Fuzzes one of fuzz_targets.py with atheris, libFuzzer for Python (pip install atheris; not a requirement):

    python tests/fuzz/run_fuzzer.py safetensors -max_total_time=600 [options of libFuzzer] [CORPUS]

The seeds and tests/fuzz/corpus/TARGET are read first. What fails is written to crash-* in the current folder:
put it into tests/fuzz/corpus/TARGET, where test_fuzz_corpus.py reads it for ever.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

HERE = Path(__file__).parent

with atheris.instrument_imports(include=["kt_kernel"]):
    sys.path.insert(0, str(HERE))
    import fuzz_targets

    import kt_kernel.checkpoint.sources
    import kt_kernel.gguf.experts
    import kt_kernel.integrations.sglang.cli
    import kt_kernel.planning.config_facts  # noqa: F401


def main() -> None:
    target, *options = sys.argv[1:]
    with tempfile.TemporaryDirectory(prefix="kt-seeds-") as seeds:
        for number, seed in enumerate(fuzz_targets.SEEDS[target]()):
            (Path(seeds) / str(number)).write_bytes(seed)
        corpora = [str(path) for path in (HERE / "corpus" / target, Path(seeds)) if path.is_dir()]
        atheris.Setup([sys.argv[0], *options, *corpora], lambda data: fuzz_targets.check(target, data))
        atheris.Fuzz()


if __name__ == "__main__":
    main()
