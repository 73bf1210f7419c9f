"""Results held against float64, and against plain PyTorch's own error in the same dtype.

A result that is beyond the bounds gets a second look: plain PyTorch runs again with weights that are off by one rounding,
and a softmax whose derivative is rounded as every fused attention's is. Where its own error then swings as far, as that
of a saturated softmax does, the result is counted as unstable, and not as a finding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .outcome import BEYOND_2X, BEYOND_5X, ERROR, FLOAT64, NON_FINITE, Outcome

Results = dict[str, Tensor]
FLOAT64_BOUND = 1e-9
ROUNDING = 1e-9  # of the whole: a gradient that is smaller is nothing but rounding, in plain PyTorch too
RERUNS = 4


@dataclass(frozen=True)
class Bounds:
    """Errors may be twice plain PyTorch's and ``floor2``, never beyond five times it and ``floor5``."""

    floor2: float
    floor5: float


BOUNDS = {
    torch.float32: Bounds(5e-7, 2e-6),
    torch.bfloat16: Bounds(5e-3, 2e-2),  # in the same proportion to its rounding, 4e-3, but a bit
}


def size_of(t: Tensor) -> float:
    """Norm in float64; numbers near the ends of its range do not overflow."""
    largest = t.abs().max().item() if t.numel() else 0.0
    if largest == 0.0 or not math.isfinite(largest):
        return largest
    return largest * (t.double() / largest).norm().item()


def difference(a: Tensor, b: Tensor) -> float:
    """Norm of a - b, in float64."""
    return size_of(a.double() - b.double())


@dataclass
class Judge:
    """Compares the results of one case, and puts what is beyond the bounds into ``outcome``.

    Errors are relative to the norm of the truth. A gradient's size is its norm times its scale, the size of what it is
    the gradient of: one below ROUNDING of the largest is rounding. It is held against the whole, as all results of plain
    PyTorch together are: whether its own is an exact zero is luck.

    Args:
        outcome: gets counts and findings.
        truth: in float64.
        scales: by name, where it is not one.
        rerun: plain PyTorch's results in a dtype, with weights that are off by one rounding; called with a seed.
        bound: of errors in float64.
    """

    outcome: Outcome
    truth: Results
    scales: dict[str, float]
    rerun: Callable[[torch.dtype, int], Results]
    bound: float = FLOAT64_BOUND

    def __post_init__(self):
        self.finite = {name for name, t in self.truth.items() if t.isfinite().all()}
        self.whole = max([size_of(self.truth[n]) * self.scales.get(n, 1.0) for n in self.finite], default=0.0)
        self._reruns: dict[torch.dtype, list[Results]] = {}

    def float64(self, ours: Results) -> None:
        """Compare our float64 results."""
        for name in self._comparable(ours):
            self.outcome.counts["float64 results"] += 1
            if not ours[name].isfinite().all():
                self.outcome.find(NON_FINITE, f"{name}: not finite in float64, where the truth is")
                continue
            error, size, rest = (
                self._error(name, ours),
                self._size(name),
                1e-12 * self.whole / self.scales.get(name, 1.0),
            )
            if error > self.bound + rest / size and error > 5 * self._swing(name, torch.float64):
                self.outcome.find(FLOAT64, f"{name}: error {error:.1e} in float64")

    def low(self, ours: Results, plain: Results, dtype: torch.dtype) -> None:
        """Compare our results in ``dtype`` with plain PyTorch's."""
        self.outcome.counts["results"] += len(ours)
        bounds, called = BOUNDS[dtype], str(dtype).removeprefix("torch.")
        for name in self._comparable(ours):
            lost = (~ours[name].isfinite() & plain[name].isfinite()).sum().item()
            if lost:
                self.outcome.find(NON_FINITE, f"{name}: {lost} of {ours[name].numel()} where plain PyTorch is finite")
            elif not plain[name].isfinite().all():
                self.outcome.counts["left out, plain PyTorch not finite"] += 1
            else:
                self.outcome.counts[f"{called} results"] += 1
                self._within(name, bounds, self._error(name, ours), self._allowed(name, plain), dtype)

    def _within(self, name: str, bounds: Bounds, error: float, allowed: float, dtype: torch.dtype) -> None:
        if error <= 2 * allowed + bounds.floor2:
            return
        swing = max(allowed, self._swing(name, dtype))
        text = f"{name}: error {error:.1e}, plain PyTorch's {allowed:.1e} ({swing:.1e} over reruns), in {dtype}"
        if not error <= 5 * swing + bounds.floor5:
            self.outcome.find(BEYOND_5X, text)
        elif not error <= 2 * swing + bounds.floor2:
            self.outcome.find(BEYOND_2X, text)
        else:
            self.outcome.counts["unstable"] += 1

    def _comparable(self, ours: Results) -> list[str]:
        """Names of results that both have, of one shape, and of finite truth."""
        if different := sorted(ours.keys() ^ self.truth.keys()):
            self.outcome.find(ERROR, f"results that only one has: {', '.join(different)}")
        for name in (same := sorted(ours.keys() & self.truth.keys())):
            if ours[name].shape != self.truth[name].shape:
                shapes = tuple(ours[name].shape), tuple(self.truth[name].shape)
                self.outcome.find(ERROR, f"{name}: shape {shapes[0]}, not {shapes[1]}")
        return [name for name in same if name in self.finite and ours[name].shape == self.truth[name].shape]

    def _size(self, name: str) -> float:
        """What errors of a result are relative to."""
        size, whole = size_of(self.truth[name]), self.whole / self.scales.get(name, 1.0)
        return (whole if size <= ROUNDING * whole else size) or 1.0

    def _error(self, name: str, results: Results) -> float:
        return difference(results[name], self.truth[name]) / self._size(name)

    def _allowed(self, name: str, plain: Results) -> float:
        """Plain PyTorch's error of a result; where that is rounding, the largest of all results beside the whole."""
        if self._size(name) == size_of(self.truth[name]):
            return self._error(name, plain)
        errors = {n: difference(plain[n], self.truth[n]) * self.scales.get(n, 1.0) for n in self.finite & plain.keys()}
        return max([error for error in errors.values() if math.isfinite(error)], default=0.0) / (self.whole or 1.0)

    def _swing(self, name: str, dtype: torch.dtype) -> float:
        """The largest error of plain PyTorch over its reruns; one that is not finite counts as none."""
        if dtype not in self._reruns:
            self._reruns[dtype] = [self.rerun(dtype, seed) for seed in range(RERUNS)]
        errors = [self._allowed(name, results) for results in self._reruns[dtype] if name in results]
        return max([error for error in errors if math.isfinite(error)], default=0.0)
