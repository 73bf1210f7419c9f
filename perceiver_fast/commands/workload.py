"""What is profiled, as options say it: without torch, which help does not need."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from perceiver_fast.insight.console import positive
from perceiver_fast.insight.names import NAMES

MODULE = f"{__package__}.profile_workload"  # the process that profilers look at
DTYPES = ("float32", "float64", "bfloat16", "float16")
PEERS = ("fast", "perceiver-pytorch")


def _option(value: Any, text: str, **more: Any) -> Any:
    """A field with this default value, and its option; ``more`` is what argparse takes."""
    return field(default=value, metadata={"help": text, "default": value, **more})


@dataclass(frozen=True)
class Workload:
    """Which model runs, on what, and how often. Every field is an option of the command, whose help says what it is."""

    geometry: str = _option("readme", "the model and its input (default: %(default)s)", choices=NAMES)
    pass_name: str = _option(
        "forward", "inference, or forward and backward (default: %(default)s)", choices=("forward", "step")
    )
    dtype: str = _option("float32", "half precision is autocast's (default: %(default)s)", choices=DTYPES)
    batch: int = _option(1, "inputs at once (default: %(default)s)", type=positive, metavar="N")
    threads: int | None = _option(None, "CPU threads (default: PyTorch's choice)", type=positive, metavar="N")
    device: str = _option("cpu", "default: cuda where there is a GPU", default=None, choices=("cpu", "cuda"))
    peer: str = _option("fast", "whose model: ours, or the one compared with", choices=PEERS)
    iterations: int = _option(3, "profiled calls, after the warm-up", default=None, type=positive, metavar="N")
    tiny: bool = _option(
        False, "the geometry's structure with few of everything, to try the command out", action="store_true"
    )

    @property
    def name(self) -> str:
        """What files about it are called."""
        parts = [self.geometry, self.pass_name, self.dtype, f"b{self.batch}", self.device]
        return "-".join(parts + [self.peer] * (self.peer != "fast") + ["tiny"] * self.tiny)

    def command(self) -> list[str]:
        """The command line of a process that runs it."""
        command = [sys.executable, "-m", MODULE]
        for name, value in asdict(self).items():
            if value is not None and value is not False:
                command += [_flag(name), *([] if value is True else [str(value)])]
        return command


def _flag(name: str) -> str:
    return f"--{name.removesuffix('_name')}"  # pass is a word of Python's


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what runs."""
    for option in fields(Workload):
        parser.add_argument(_flag(option.name), dest=option.name, **option.metadata)
