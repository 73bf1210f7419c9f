"""From counted work and a time to throughput, and to shares of what the CPU can do.

The roofs are measured in the same session (:mod:`perceiver_fast.insight.roofs`): multiply-adds, exponentials and copied bytes a
second. Exponentials and multiply-adds are vector instructions that take turns, so their times add; memory works beside them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from perceiver_fast.insight.geometries import Geometry
from perceiver_fast.insight.roofs import measure_roofs
from perceiver_fast.insight.work import WorkCounter, total
from perceiver_fast.ops import work as counting

BACKWARD = 2  # a step's products, over those of its forward alone: each has one for either operand's gradient


@dataclass(frozen=True)
class Work:
    """Of one call.

    Args:
        inputs: images, clips or clouds: the batch.
        tokens: that are attended to, of all inputs.
        pairs: of queries (times heads and cross-attentions) and tokens, forward only: softmax weights.
        bytes: that any implementation has to read at least: inputs and parameters.
        multiply_adds, exponentials: of this implementation; None where they are not counted.
    """

    inputs: int
    tokens: int
    pairs: int
    bytes: int
    multiply_adds: float | None = None
    exponentials: float | None = None


def throughput(work: Work, seconds: float, threads: int) -> dict:
    """What goes into the record: rates, and shares of the roofs in percent (None without roofs or counts).

    ``percent_of_exp_roof``: as if nothing but one exponential a pair had to be done. ``percent_of_copy_roof``: as if
    nothing but inputs and parameters had to pass through memory. ``percent_of_fma_roof``: the implementation's
    counted multiply-adds. ``percent_of_roof``: all it counts, done at the roofs, over the time it took.
    """
    roofs, shares = measure_roofs(threads), dict.fromkeys(("exp", "copy", "fma"))
    whole = None
    if roofs is not None:
        shares["copy"] = work.bytes / roofs.copied_bytes
        shares["exp"] = work.pairs / roofs.exponentials if work.pairs else None
        if work.multiply_adds is not None:
            shares["fma"] = work.multiply_adds / roofs.multiply_adds
            vectors = shares["fma"] + (work.exponentials or 0) / roofs.exponentials
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


def counted(module: Callable, *inputs: torch.Tensor) -> counting.Work:
    """What a forward's operators do, counted on tensors without content."""
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as mode, WorkCounter() as counter:
        module(*(mode.from_tensor(x) for x in inputs))
    return total(counter.operators)


def module_work(geometry: Geometry, batch: int, pass_name: str, module: nn.Module, attentions: int, *inputs) -> Work:
    """Of one call of a model or a layer.

    Args:
        geometry, batch, pass_name: what is measured.
        module: in plain form, not compiled.
        attentions: cross-attentions to the input in one forward.
        *inputs: of the module.
    """
    pairs = batch * geometry.heads * geometry.queries * geometry.tokens * attentions
    least = sum(t.nbytes for t in (*inputs, *module.parameters()))
    counts = counted(module, *inputs)
    work = Work(batch, batch * geometry.tokens, pairs, least, counts.multiply_adds, counts.exponentials)
    return scaled(work, pass_name)


def scaled(work: Work, pass_name: str) -> Work:
    """A step's work by its forward's: the backward has every product twice, every exponential once more."""
    if pass_name == "forward":
        return work
    products = None if work.multiply_adds is None else (1 + BACKWARD) * work.multiply_adds
    exponentials = None if work.exponentials is None else 2 * work.exponentials
    return Work(work.inputs, work.tokens, work.pairs, 2 * work.bytes, products, exponentials)
