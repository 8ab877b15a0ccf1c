"""LoRA of experts without PEFT and transformers: what training and serving share.

attach.py           a LoRA on a layer that serves
backend.py          the seam between autograd and what computes the experts of a layer
kernel_backend.py   ... by the extension's kernels
files.py            what an adapter's folder holds
layout.py           names and shapes in adapter files
limits.py           what an adapter may have that is not computed
merged.py           a LoRA in the weights themselves
"""
