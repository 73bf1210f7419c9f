"""The benchmarks proper: every peer at every level, by pytest-benchmark."""
