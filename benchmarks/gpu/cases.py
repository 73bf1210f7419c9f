"""What the battery measures: cases of published geometries, in the order of what they tell.

Nothing here imports torch: ``--help`` and ``--list`` answer at once. The geometries' sizes are those of
perceiver_fast/insight/geometries.json.
"""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

LEVELS = ("op", "model")
BATCHES = (8, 64, 1)
DTYPES = ("bf16", "fp32")
PASSES = ("forward", "step")  # step: forward and backward
HEAD = ("imagenet-lucid", "imagenet-paper", "readme")  # the geometries that tell most
NAMES = (*HEAD, "video", "flow", "hf-fourier")
SAME_OP = {"hf-fourier": "imagenet-paper"}  # geometries whose cross-attention is another's, and not timed twice


@dataclass(frozen=True)
class Case:
    """One line of the table: every side is measured on it."""

    level: str
    geometry: str
    batch: int
    dtype: str
    pass_name: str

    @property
    def name(self) -> str:
        """As ``--case`` and ``--profile`` take it."""
        return f"{self.level}/{self.geometry}/{self.batch}/{self.dtype}/{self.pass_name}"

    @property
    def step(self) -> bool:
        """Whether there is a backward pass."""
        return self.pass_name == "step"

    @property
    def headline(self) -> bool:
        """Whether the compiled peers, which take seconds to compile, are measured here too."""
        return self.level == "op" and self.geometry in HEAD and (not self.step or self.batch == 8)


def batch_size(text: str) -> int:
    """An argument's type."""
    if not (text.isdecimal() and int(text) > 0):
        raise ArgumentTypeError(f"expected a batch size, at least 1, got {text!r}")
    return int(text)


def parse_case(text: str) -> Case:
    """The case that :attr:`Case.name` names: an argument's type.

    Raises:
        ArgumentTypeError: it names none; the message says which part and what it may be.
    """
    parts = text.split("/")
    if len(parts) != 5:
        raise ArgumentTypeError(f"expected LEVEL/GEOMETRY/BATCH/DTYPE/PASS, as op/readme/8/bf16/forward, got {text!r}")
    level, geometry, batch, dtype, pass_name = parts
    for part, known in ((level, LEVELS), (geometry, NAMES), (dtype, DTYPES), (pass_name, PASSES)):
        if part not in known:
            raise ArgumentTypeError(f"expected one of {', '.join(known)}, got {part!r} in {text!r}")
    return Case(level, geometry, batch_size(batch), dtype, pass_name)


def _urgency(case: Case) -> tuple:
    """Sort key: a run that is cut short shall have lost the least."""
    stages = {"op": (0, 1) if case.geometry in HEAD else (2, 4), "model": (3, 5)}  # forward, step
    stage = stages[case.level][case.step]
    batch = BATCHES.index(case.batch) if case.batch in BATCHES else len(BATCHES)
    return stage, batch, DTYPES.index(case.dtype), NAMES.index(case.geometry)


def select(
    levels: Sequence[str] = LEVELS,
    geometries: Sequence[str] = NAMES,
    batches: Sequence[int] = BATCHES,
    dtypes: Sequence[str] = DTYPES,
    passes: Sequence[str] = PASSES,
) -> tuple[list[Case], list[dict]]:
    """The cases asked for, the most telling first; and those left out, with the reason."""
    cases, skipped = [], []
    wanted = {Case(*parts) for parts in product(levels, geometries, batches, dtypes, passes)}
    for case in sorted(wanted, key=_urgency):
        if case.level == "op" and case.geometry in SAME_OP:
            skipped.append({"case": case.name, "reason": f"the same op as {SAME_OP[case.geometry]}"})
        else:
            cases.append(case)
    return cases, skipped
