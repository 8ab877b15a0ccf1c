"""Fine-tuning of models whose experts are in main memory.

backend.py          the seam between autograd and what computes the experts of a layer
reference.py        ... in plain torch, in any float dtype
function.py         the autograd function over a backend
"""
