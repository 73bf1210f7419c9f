"""Scripts around NVIDIA's profilers, and their results in few numbers; docs/profiling.md says how to use them."""
