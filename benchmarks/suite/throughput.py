"""From counted work and a time to throughput, and to shares of what the CPU can do.

The roofs are measured in the same session (:mod:`perceiver_fast.insight.roofs`): multiply-adds, exponentials and copied bytes a
second. Exponentials and multiply-adds are vector instructions that take turns, so their times add; memory works beside them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.sides import Case
from benchmarks.suite.levels import LEVELS
from perceiver_fast.insight.roofs import measure_roofs
from perceiver_fast.insight.work import WorkCounter, total

BACKWARD = 2  # a step's products, over those of its forward alone: each has one for either operand's gradient


@dataclass(frozen=True)
class Work:
    """Of one call."""

    inputs: int  # images, clips or clouds: the batch
    tokens: int  # that are attended to, of all inputs; of an op on latents, these
    pairs: int  # of queries (times heads and cross-attentions) and tokens, forward only: softmax weights
    bytes: int  # that have to pass at least: inputs and parameters, and an op's results
    multiply_adds: float  # of this implementation, like exponentials
    exponentials: float


def throughput(work: Work, seconds: float, threads: int) -> dict:
    """What goes into the record: rates, and shares of the roofs in percent (None without roofs).

    ``percent_of_exp_roof``: as if nothing but one exponential a pair had to be done. ``percent_of_copy_roof``: as if
    nothing but inputs and parameters had to pass through memory. ``percent_of_fma_roof``: the implementation's
    counted multiply-adds. ``percent_of_roof``: all it counts, done at the roofs, over the time it took.
    """
    roofs, shares, whole = measure_roofs(threads), dict.fromkeys(("exp", "copy", "fma")), None
    if roofs is not None:
        shares["exp"] = work.pairs / roofs.exponentials if work.pairs else None
        shares["copy"] = work.bytes / roofs.copied_bytes
        shares["fma"] = work.multiply_adds / roofs.multiply_adds
        vectors = shares["fma"] + work.exponentials / roofs.exponentials
        whole = 100 * max(vectors, shares["copy"]) / seconds
    return {
        "tokens": work.tokens // work.inputs,
        "inputs_per_second": work.inputs / seconds,
        "tokens_per_second": work.tokens / seconds,
        "pairs_per_second": work.pairs / seconds if work.pairs else None,
        "multiply_adds": work.multiply_adds,
        "exponentials": work.exponentials,
        "bytes_at_least": work.bytes,
        **{f"percent_of_{name}_roof": s and 100 * s / seconds for name, s in shares.items()},
        "percent_of_roof": whole,
    }


def work_of(case: Case) -> Work:
    """What one call amounts to: a side's own operators, counted on tensors without content."""
    level, geometry, batch = LEVELS[case.level], case.geometry, case.batch
    side = level.peers[case.peer].build(case)
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as mode, WorkCounter() as counter:
        outputs = (side.plain or side.apply)(*(mode.from_tensor(x) for x in side.inputs))
    counts = total(counter.operators)
    outputs = (outputs if isinstance(outputs, tuple) else (outputs,)) if level.op else ()
    rows = batch * (geometry.queries if level.latents else geometry.tokens)
    pairs = batch * geometry.heads * geometry.queries * geometry.tokens * level.attentions(geometry)
    least = sum(t.nbytes for t in (*side.inputs, *side.parameters.values(), *outputs))
    forward = Work(batch, rows, pairs, least, counts.multiply_adds, counts.exponentials)
    return step_of(forward) if case.step else forward


def step_of(work: Work) -> Work:
    """A step's work by its forward's: the backward has every product twice, every exponential once more."""
    products = (1 + BACKWARD) * work.multiply_adds
    return replace(work, bytes=2 * work.bytes, multiply_adds=products, exponentials=2 * work.exponentials)
