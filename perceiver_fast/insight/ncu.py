"""What ncu is asked about this package's kernels: which of them, which sections, which metrics, and what each tells.

Names are those of Nsight Compute 2022 and later. A metric that a GPU does not have reads ``n/a``, and the next name of
its entry is tried.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from perceiver_fast.ops.declaration import OPS

SECTIONS = (
    "SpeedOfLight",
    "ComputeWorkloadAnalysis",
    "MemoryWorkloadAnalysis",
    "SchedulerStats",
    "WarpStateStats",
    "LaunchStats",
    "Occupancy",
)


@dataclass(frozen=True)
class Metric:
    """A number of a kernel: what summaries call it, its names in ncu, and what it is in."""

    key: str
    names: tuple[str, ...]
    unit: str  # ns, byte, %, count


def _elapsed(name: str) -> str:
    return f"{name}.avg.pct_of_peak_sustained_elapsed"


# Shares of peaks are over the elapsed cycles, all of them: so they can be held against each other.
METRICS = (
    Metric("time", ("gpu__time_duration.sum",), "ns"),
    Metric("exp", (_elapsed("sm__inst_executed_pipe_xu"),), "%"),  # the XU (MUFU) pipe: exp2, rsqrt, conversions
    Metric("tensor", (_elapsed("sm__pipe_tensor_cycles_active"),), "%"),
    Metric("fma", (_elapsed("sm__pipe_fma_cycles_active"),), "%"),
    Metric("issue", (_elapsed("sm__inst_issued"),), "%"),
    Metric("memory", (_elapsed("gpu__dram_throughput"),), "%"),
    Metric("l2", (_elapsed("lts__throughput"),), "%"),
    Metric("xu_instructions", ("smsp__inst_executed_pipe_xu.sum",), "count"),  # of warps: 32 exponentials each
    Metric("dram_read", ("dram__bytes_read.sum",), "byte"),
    Metric("dram_written", ("dram__bytes_write.sum",), "byte"),
    Metric("l2_hits", ("lts__t_sector_hit_rate.pct",), "%"),
    Metric("occupancy", ("sm__warps_active.avg.pct_of_peak_sustained_active",), "%"),
    Metric("registers", ("launch__registers_per_thread",), "count"),
    # Local memory is what registers spill to; sm_100 has the second names alone.
    Metric("local_loads", ("smsp__inst_executed_op_local_ld.sum", "smsp__sass_inst_executed_op_local_ld.sum"), "count"),
    Metric(
        "local_stores", ("smsp__inst_executed_op_local_st.sum", "smsp__sass_inst_executed_op_local_st.sum"), "count"
    ),
)

# What a kernel can be bound by, and the share of its peak from which it is: that of ncu's own SpeedOfLight rule.
LIMITS = ("exp", "tensor", "fma", "issue", "memory", "l2")
BOUND_FROM = 60.0
STALL = re.compile(r"smsp__average_warps_issue_stalled_(?P<reason>\w+)_per_issue_active\.ratio")  # of WarpStateStats


def names() -> str:
    """All metrics, as ``ncu --metrics`` takes them."""
    return ",".join(name for metric in METRICS for name in metric.names)


def kernel_filter(wish: str | None) -> str:
    """The regular expression of the kernels to profile.

    Args:
        wish: an op's name, a regular expression, or None for all of this package.

    Example:
        >>> kernel_filter("cross_attention")
        'cross_attention_(.*_)?kernel'
    """
    if wish is None:
        return "|".join(f"({op.kernels})" for op in OPS.values())
    return OPS[wish].kernels if wish in OPS else wish
