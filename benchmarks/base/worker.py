"""One side of a comparison of two revisions: a process that imports the package of one tree and times calls on command.

``base_worker.py TREE THREADS`` reads one JSON object a line from standard input and answers each with one on standard
output, ``{"error": ..}`` when it failed; it ends with its input. A copy of this file runs in a folder of its own, so that
nothing but TREE can be imported and both sides are measured by the same lines. It relies on nothing but the models'
names and arguments, which are perceiver-pytorch's: revisions that lack everything else can be measured.

    {"load": task}  builds the model, loads weights and input, saves the results of a first call; answers with the seconds
                    of a third one. A task holds family, arguments, pass, dtype, and the paths weights, input, results.
    {"time": n}     answers with the seconds of n calls; more than one are preceded by one that is not timed, since the
                    other side had the caches.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, spec_from_file_location
from pathlib import Path

import torch
from torch import Tensor, nn

TREE = Path(sys.argv[1]).resolve()


class TreeFinder:
    """Finds ``perceiver_fast.kernels`` where a checkout has it."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        kernels = TREE / "kernels"
        if name != "perceiver_fast.kernels" or not kernels.exists():
            return None
        return spec_from_file_location(name, kernels / "__init__.py", submodule_search_locations=[str(kernels)])


# An editable install would give modules of its own checkout for those that this tree lacks, the extension among them.
others = [
    finder
    for finder in sys.meta_path
    if not getattr(finder, "__module__", "").startswith("__editable___perceiver_fast")
]
sys.meta_path[:] = [TreeFinder, *others]

import perceiver_fast as pf


class Points(nn.Module):
    """A cloud: positions alone, no raw channels."""

    def __init__(self, *, input_channels: int, **arguments):
        super().__init__()
        self.model = pf.Perceiver(**arguments | {"input_channels": 0, "input_axis": input_channels})

    def forward(self, coords: Tensor) -> Tensor:
        return self.model(coords[..., :0], coords=coords)


def build(family: str, arguments: dict) -> nn.Module:
    """The model of a geometry, with random weights."""
    if family == "io":
        arguments = {name: value for name, value in arguments.items() if name != "input_axis"}
        return pf.PerceiverIO(dim=arguments.pop("input_channels"), **arguments)
    return {"perceiver": pf.Perceiver, "points": Points}[family](**arguments)


def make_call(model: nn.Module, data: Tensor, pass_name: str, dtype: str) -> Callable[[], dict[str, Tensor]]:
    """A call that returns the output, and after a step the gradient of every parameter that has one, by name."""
    wanted = dict(sorted(model.named_parameters()))

    def forward() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            return model(data)

    def call() -> dict[str, Tensor]:
        if pass_name == "forward":
            with torch.no_grad():
                return {"output": forward()}
        output = forward()
        cotangent = torch.linspace(-1.0, 1.0, output.numel()).to(output.dtype).view(output.shape)
        grads = torch.autograd.grad(output, list(wanted.values()), cotangent, allow_unused=True)
        return {"output": output} | {name: grad for name, grad in zip(wanted, grads, strict=True) if grad is not None}

    return call


def timed(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class Side:
    """What the commands act on."""

    def load(self, task: dict) -> float:
        """Make the call of ``task``; returns the seconds of a warm one."""
        self.call = None  # the memory of the last one
        model = build(task["family"], task["arguments"])
        model.load_state_dict(torch.load(task["weights"], weights_only=True))
        model.train(task["pass"] == "step")
        self.call = make_call(model, torch.load(task["input"], weights_only=True), task["pass"], task["dtype"])
        results = {name: result.detach().clone() for name, result in self.call().items()}
        torch.save(results, task["results"])
        self.call()  # packs weights
        return timed(self.call)

    def time(self, count: int) -> list[float]:
        """Seconds of ``count`` calls."""
        if count > 1:
            self.call()
        return [timed(self.call) for _ in range(count)]


def facts() -> dict:
    """What was imported: its extension's instruction set, or why there is none.

    Raises:
        ImportError: something of it is not of TREE.
    """
    for name in ("perceiver_fast", "perceiver_fast._C", "perceiver_fast.kernels"):
        spec = find_spec(name)
        if spec and not Path(spec.origin).resolve().is_relative_to(TREE):
            raise ImportError(f"expected {name} of {TREE}, got {spec.origin}")
    try:
        from perceiver_fast import extension
    except ImportError as error:  # a revision before it had one
        return {"isa": None, "extension_error": str(error)}
    isa = extension.module.active_isa() if extension.module else None
    return {"isa": isa, "extension_error": extension.error}


def main(threads: int) -> None:
    """Answer commands until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who gives the commands
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    torch.set_num_threads(threads)
    side = Side()
    commands = {"facts": lambda _: facts(), "load": side.load, "time": side.time}
    for line in sys.stdin:
        ((name, argument),) = json.loads(line).items()
        try:
            answer = {name: commands[name](argument)}
        except Exception as error:  # noqa: BLE001
            # Whatever a revision raises is its answer.
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    main(int(sys.argv[2]))
