"""The GPU battery's parts; ``benchmarks/gpu_battery.py`` is the command, ``benchmarks/GPU.md`` the manual."""
