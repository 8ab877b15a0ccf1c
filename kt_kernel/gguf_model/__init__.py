"""A whole model out of one GGUF file: what a Hugging Face directory would say of it, and its dense weights.

    architectures  the table: which metadata and tensors of an architecture are which of the published model
    fields         metadata and shapes of one file, in the published model's terms
    config         config.json and generation_config.json
    dense          the tensors outside the routed experts, decoded one by one under published names
    pre_tokenizers the table of the ways in which text is cut before BPE
    tokenizer      tokenizer.json and tokenizer_config.json
    description    these files in the user's cache, a few MB; the weights stay in the GGUF file

The routed experts are the business of method LLAMAFILE, which reads them from the same file.
"""

from kt_kernel.gguf_model.description import (
    ModelDescription,
    describe,
    described_file,
    find_gguf,
    served_name,
)

__all__ = ["ModelDescription", "describe", "described_file", "find_gguf", "served_name"]
