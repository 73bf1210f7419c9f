"""A part that fails as it is told to: what shows that the campaign sees failures. It is not among the parts that run."""

from __future__ import annotations

import ctypes

import torch

from .judge import Judge
from .outcome import Outcome

PLAIN: dict[str, str] = {"do": "nothing"}


def draw(seed: int) -> dict:
    """A wrong result, whatever the seed."""
    return dict(seed=seed, do="wrong", size=80 + seed)


def run(case: dict) -> Outcome:
    """Do nothing, crash, raise, or give a result that is one percent off."""
    outcome = Outcome()
    if case["do"] == "crash":
        ctypes.string_at(0)
    elif case["do"] == "raise":
        1 / 0
    elif case["do"] == "wrong" and case["size"]:
        truth = {"output": torch.ones(case["size"], dtype=torch.float64)}
        judge = Judge(outcome, truth, {}, lambda dtype, seed: {"output": truth["output"].to(dtype)})
        judge.float64({"output": truth["output"] * 1.01})
        judge.low({"output": truth["output"].float() * 1.01}, {"output": truth["output"].float()}, torch.float32)
    return outcome
