"""One model called from four threads, two models trained at once: the bits are those of one thread."""

from __future__ import annotations

import copy
import random
import threading
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .models import PLAIN as PLAIN_MODEL
from .models import Built, build, draw_model
from .outcome import DIFFERS, Outcome

PLAIN = PLAIN_MODEL | {"what": "infer"}
WHAT = ("infer", "gradients", "train")
STEPS = 3


def draw(seed: int) -> dict:
    """A model, and what is done with it at once."""
    r = random.Random(seed)
    case = dict(seed=seed, what=r.choice(WHAT), threads=r.choice([1, 1, 2])) | draw_model(r)
    case |= dict(values="normal", magnitude=1.0, sharp=1.0, sharp_self=1.0)
    case["latent_dim"] = r.choice([16, 33, 64, 128])
    return case


def at_once(works: list[Callable[[], object]], threads: int) -> list[object]:
    """Results of functions, every one called in a thread of its own; all begin together.

    A new thread begins with OpenMP's number of threads, until it asks torch for its own; and BLAS libraries round
    differently with another number. So every thread is told.

    Raises:
        Exception: what one of them raised.
    """
    gate, results, errors = threading.Barrier(len(works)), [None] * len(works), []

    def call(index: int) -> None:
        try:
            torch.set_num_threads(threads)
            gate.wait()
            results[index] = works[index]()
        except Exception as error:
            errors.append(error)

    running = [threading.Thread(target=call, args=(index,)) for index in range(len(works))]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    if errors:
        raise errors[0]
    return results


def infer(built: Built, model: nn.Module) -> list[Tensor]:
    """Several calls in inference."""
    with torch.no_grad():
        return [built.run(model, **built.inputs).clone() for _ in range(STEPS)]


def gradients(built: Built, model: nn.Module) -> list[Tensor]:
    """Output and gradients, which are returned rather than collected in the parameters."""
    out = built.run(model, **built.inputs)
    learning = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(out.square().sum(), learning, allow_unused=True)
    return [out.detach(), *(grad for grad in found if grad is not None)]


def train(built: Built, model: nn.Module) -> list[Tensor]:
    """Parameters after some steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(STEPS):
        optimizer.zero_grad()
        built.run(model, **built.inputs).square().mean().backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def run(case: dict) -> Outcome:
    """Do it alone, then at once, and compare bits."""
    outcome, what = Outcome(), case["what"]
    torch.set_num_threads(case["threads"])
    built = build(case, case["seed"])
    if what == "train":  # two models, each by itself first
        models = [built.ours, copy.deepcopy(built.ours)]
        with torch.no_grad():
            for p in models[1].parameters():
                p.mul_(1.5)
        alone = [train(built, copy.deepcopy(model)) for model in models]
        found = at_once([lambda m=model: train(built, m) for model in models], case["threads"])
    else:
        work = {"infer": infer, "gradients": gradients}[what]
        alone = [work(built, copy.deepcopy(built.ours))] * 4
        found = at_once([lambda: work(built, built.ours)] * 4, case["threads"])
    for thread, (expected, actual) in enumerate(zip(alone, found)):
        for index, (a, b) in enumerate(zip(expected, actual)):
            outcome.counts["tensors"] += 1
            if not torch.equal(a.nan_to_num(nan=7e7), b.nan_to_num(nan=7e7)):
                error = (a - b).norm().item() / max(a.norm().item(), 1e-30)
                outcome.find(DIFFERS, f"{what}, thread {thread}, tensor {index}: off by {error:.1e}")
    outcome.counts[f"{what} cases"] += 1
    return outcome
