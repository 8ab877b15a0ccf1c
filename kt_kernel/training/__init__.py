"""Fine-tuning of models whose experts are in main memory.

backend.py       the seam between autograd and what computes, and the shapes of everything on it
"""
