"""The hybrid engine under models of Hugging Face transformers: doc/transformers.md.

loading.py    from_pretrained: a patched model whose expert weights transformers never holds
patching.py   patch: puts the hybrid engine into a model that is loaded already
blocks.py     where models keep their experts, and whether they compute what ours do
experts.py    the module that takes their place
dense.py      the tensors of a checkpoint beside its experts, decoded where they are quantised
"""

from kt_kernel.integrations.options import ExpertOptions
from kt_kernel.integrations.transformers.loading import from_pretrained
from kt_kernel.integrations.transformers.patching import patch

__all__ = ["ExpertOptions", "from_pretrained", "patch"]
