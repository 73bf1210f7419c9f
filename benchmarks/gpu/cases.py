"""What the battery measures: cases of published geometries, in the order of what they tell.

Nothing here imports torch: ``--help`` and ``--list`` answer at once. The geometries' sizes are those of
perceiver_fast/insight/geometries.py.
"""

from __future__ import annotations

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
    def headline(self) -> bool:
        """Whether the compiled peers, which take seconds to compile, are measured here too."""
        return self.level == "op" and self.geometry in HEAD and (self.pass_name == "forward" or self.batch == 8)


def parse_case(text: str) -> Case:
    """The case that :attr:`Case.name` names.

    Raises:
        ValueError: it names none; the message says which part and what it may be.
    """
    parts = text.split("/")
    choices = (LEVELS, NAMES, None, DTYPES, PASSES)
    if len(parts) != len(choices):
        raise ValueError(f"expected LEVEL/GEOMETRY/BATCH/DTYPE/PASS, as op/readme/8/bf16/forward, got {text!r}")
    for part, known in zip(parts, choices):
        if known is None and not (part.isdecimal() and int(part) > 0):
            raise ValueError(f"expected a batch size, at least 1, got {part!r} in {text!r}")
        if known is not None and part not in known:
            raise ValueError(f"expected one of {', '.join(known)}, got {part!r} in {text!r}")
    level, geometry, batch, dtype, pass_name = parts
    return Case(level, geometry, int(batch), dtype, pass_name)


def _urgency(case: Case) -> tuple:
    """Sort key: a run that is cut short shall have lost the least."""
    head = case.geometry in HEAD
    stages = {("op", "forward"): 0 if head else 2, ("op", "step"): 1 if head else 4, ("model", "forward"): 3}
    stage = stages.get((case.level, case.pass_name), 5)
    batch = BATCHES.index(case.batch) if case.batch in BATCHES else len(BATCHES)
    return stage, batch, DTYPES.index(case.dtype), NAMES.index(case.geometry)


def select(
    geometries: tuple[str, ...] = (),
    batches: tuple[int, ...] = (),
    dtypes: tuple[str, ...] = (),
    levels: tuple[str, ...] = (),
    passes: tuple[str, ...] = (),
) -> tuple[list[Case], list[dict]]:
    """The cases asked for (nothing asked for: all), the most telling first; and those left out, with the reason."""
    wanted = product(levels or LEVELS, geometries or NAMES, batches or BATCHES, dtypes or DTYPES, passes or PASSES)
    cases, skipped = [], []
    for case in sorted({Case(*parts) for parts in wanted}, key=_urgency):
        if case.level == "op" and case.geometry in SAME_OP:
            skipped.append({"case": case.name, "reason": f"the same op as {SAME_OP[case.geometry]}"})
        else:
            cases.append(case)
    return cases, skipped
