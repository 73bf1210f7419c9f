"""This checkout beside another of its commits, in turns: ``python -m benchmarks.base``."""
