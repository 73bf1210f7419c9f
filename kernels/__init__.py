"""Triton kernels, one file per op, with the stems of ``perceiver_fast.ops``. None yet: GPUs run PyTorch's attention."""
