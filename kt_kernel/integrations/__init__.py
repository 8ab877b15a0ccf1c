"""Thin adapters between kt_kernel and the programs that use it, one folder per program."""
