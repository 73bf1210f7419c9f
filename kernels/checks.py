"""What operators expect of their arguments, checked on the host before anything is launched, as csrc/cpu/checks.h does.

Exported graphs call operators with whatever they were given, and a kernel reads memory wherever sizes lead it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

HALF_OR_FLOAT = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Check:
    """The checks of one operator's arguments; ``op`` begins their messages. All raise RuntimeError."""

    op: str

    def expect(self, holds: bool, expected: str, got: object) -> None:
        """Raise unless ``holds``."""
        if not holds:
            raise RuntimeError(f"{self.op}: expected {expected}, got {got}")

    def dtype(self, name: str, t: Tensor | None, *dtypes: torch.dtype) -> None:
        """Of one of these dtypes."""
        if t is not None and t.dtype not in dtypes:
            expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dict.fromkeys(dtypes))
            raise RuntimeError(f"{self.op}: expected {name} in {expected}, got {t.dtype}")

    def shape(self, name: str, t: Tensor | None, shape: Sequence[int], form: str) -> None:
        """Of this shape; ``form`` names its sizes, "[B, N, L]"."""
        if t is not None and tuple(t.shape) != tuple(shape):
            raise RuntimeError(f"{self.op}: expected {name} {form} = {list(shape)}, got {list(t.shape)}")

    def tensor(self, name: str, t: Tensor | None, dtype: torch.dtype, shape: Sequence[int], form: str) -> None:
        """Of this dtype and shape; None passes."""
        self.dtype(name, t, dtype)
        self.shape(name, t, shape, form)

    def rank(self, name: str, t: Tensor, rank: int, form: str) -> None:
        """Of so many dimensions."""
        self.expect(t.dim() == rank, f"{name} {form}", f"shape {list(t.shape)}")

    def eps(self, value: float) -> None:
        """What is added to a variance."""
        self.expect(math.isfinite(value) and value >= 0, "eps of at least 0", value)

    def dropout(self, probability: float, seed: Tensor | None) -> None:
        """A probability, and the seed that decides what is dropped."""
        self.expect(0 <= probability < 1, "a dropout probability in [0, 1)", probability)
        if seed is None or seed.numel() != 2:  # the second is the index of the first token
            self.tensor("seed", seed, torch.int64, (1,), "of one number, or two")
        else:
            self.tensor("seed", seed, torch.int64, (2,), "of one number, or two")
        self.expect(probability == 0 or seed is not None, f"a seed with dropout {probability}", "none")
