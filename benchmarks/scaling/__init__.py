"""Time and peak memory as tokens or latents grow: ``python -m benchmarks.scaling``."""
