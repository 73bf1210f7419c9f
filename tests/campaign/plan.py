"""What the campaign runs, and for how long each."""

from __future__ import annotations

from dataclasses import dataclass

from perceiver_fast import extension

from .sweep import Run

PARTS = {
    "numeric": "random models against perceiver-pytorch in float64",
    "ops": "random calls of every public op against the reference in float64",
    "raw": "registered operators called with changed arguments",
    "staleness": "writes to parameters by every route between inference calls",
    "threads": "one model from four threads, two models trained at once",
    "sanitizers": "ops and raw under ASan and UBSan; csrc/core under TSan, ASan and UBSan",
}


@dataclass(frozen=True)
class Share:
    """A run, and its share of the campaign's time beside the others'."""

    run: Run
    weight: float


def on_isas(part: str, weight: float) -> list[Share]:
    """A part on every instruction set of this machine."""
    isas = extension.module.available_isas()
    return [Share(Run(part, isa, {"PERCEIVER_FAST_CPU_ISA": isa}), weight / len(isas)) for isa in isas]


def shares(part: str) -> list[Share]:
    """The ordinary runs of a part; those under sanitizers are planned where these are built."""
    if part in ("numeric", "ops"):
        return on_isas(part, {"numeric": 4.0, "ops": 1.5}[part])
    return [Share(Run(part), {"raw": 1.0, "staleness": 1.0, "threads": 0.7}[part])]
