"""Triton kernels, one file per op, with the stems of ``perceiver_fast.ops``.

Importing this package imports nothing of Triton; ``perceiver_fast.ops`` imports a kernel's module when it first runs.
"""
