"""How long perceiver-fast takes and how much memory, beside perceiver-pytorch: ``python -m benchmarks --help``."""
