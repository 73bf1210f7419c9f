"""The options of all commands, a function a command, whose docstring is the description in its help.

They are apart from what the commands do, so that help and usage errors need neither torch nor rich.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from inspect import cleandoc
from pathlib import Path

from perceiver_fast.commands import workload
from perceiver_fast.insight.console import positive
from perceiver_fast.insight.names import NAMES

COMPARED = ("readme", "imagenet-lucid-1")  # the models of the demo
DTYPES = ("float32", "bfloat16", "float16", "float64")
CLASSES = ("Perceiver", "PerceiverIO", "gated.Perceiver", "mixed_latents.Perceiver", "experimental.Perceiver")
THREADS = "CPU threads (default: PyTorch's choice)"


def info(parser: argparse.ArgumentParser) -> None:
    """What is installed, what was built and what runs: works also when the extension does not.

    The exit code is 1 when something that was built does not load.
    """
    add = parser.add_argument
    add("--json", action="store_true", help="print JSON: also what a GPU would run, where there is none")
    add("--roofs", action="store_true", help="also measure what this CPU can do at most; takes half a second")
    add(
        "--kernels",
        action="store_true",
        help="compile the Triton kernels ahead of time and list what each needs; needs no GPU, takes minutes",
    )
    add("--arch", type=int, nargs="+", metavar="SM", help="with --kernels: as sm_XY writes them; default: 80 90 100")


def demo(parser: argparse.ArgumentParser) -> None:
    """The demo: a photograph at full resolution through perceiver-pytorch and perceiver-fast, with the same weights.

    Prints time, memory and how far the outputs differ, and draws where latents look.
    """
    add = parser.add_argument
    add("--image", type=Path, metavar="PATH", help="the photograph (default: china.jpg of scikit-learn, 427 x 640)")
    add("--max-side", type=positive, metavar="N", help="scale the photograph down to at most N x N, for quick tests")
    add("--out", type=Path, default=Path("out"), metavar="DIR", help="where attention.png goes (default: %(default)s)")
    add("--json", type=Path, metavar="PATH", help="also store the rows and conditions as JSON")
    add("--repeats", type=positive, default=3, metavar="N", help="timed runs, after a warm-up (default: %(default)s)")
    add("--threads", type=positive, metavar="N", help=THREADS)
    add(
        "--geometry",
        action="append",
        choices=COMPARED,
        help="a model to compare, repeatable (default: all). readme: the one of perceiver-pytorch's README, depth 6; "
        "imagenet-lucid-1: the paper's ImageNet model in perceiver-pytorch's layout, one of its 8 blocks",
    )


def accelerate(parser: argparse.ArgumentParser) -> None:
    """What pf.accelerate does with a model of another library: a table of its modules, and the speed on an example.

    MODULE:CALLABLE is called without arguments. It returns a model, or a model and an example of what the model is
    called with: a tensor, a tuple of arguments or a dict of keywords. With an example the accelerated model is compared
    with the original one, outputs and gradients, and both are timed. The current folder is searched for modules too.
    """
    add = parser.add_argument
    add("source", metavar="MODULE:CALLABLE", help="what makes the model, such as mymodels:build")
    add("--threads", type=positive, metavar="N", help=THREADS)
    add("--json", action="store_true", help="print JSON")


def explain(parser: argparse.ArgumentParser) -> None:
    """What runs every layer of a model on an input, its predicted time, and the work it saves.

    The model is your own (MODULE:CALLABLE, or --arguments of a class of this package, with or without a --checkpoint),
    or a published one (--geometry). Nothing is computed: tensors have shapes and no content. Times are what the counted
    work takes at the rates that this CPU was measured to reach at most; a real forward takes longer.
    """
    which = parser.add_argument_group("which model")
    which.add_argument(
        "source",
        nargs="?",
        metavar="MODULE:CALLABLE",
        help="such as mymodels:build. Called without arguments, it returns a model, or a model and an example of what "
        "the model is called with: a tensor, a tuple or a dict of keywords. The current folder is searched, too",
    )
    which.add_argument(
        "--arguments",
        metavar="TEXT",
        help="the constructor's: 'depth=6, num_latents=256, ..', JSON, or a .json file",
    )
    which.add_argument(
        "--class",
        dest="model_class",
        choices=CLASSES,
        metavar="NAME",
        help=f"of --arguments (default: {CLASSES[0]}; also {', '.join(CLASSES[1:])})",
    )
    which.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="a state_dict that torch.save wrote: says whether --arguments fit it, and its dtype is taken",
    )
    which.add_argument("--geometry", choices=NAMES, metavar="NAME", help="a published model and its input: see --list")
    which.add_argument("--list", action="store_true", help="list the published models: sizes, sources, what was cut")
    what = parser.add_argument_group("on what")
    what.add_argument(
        "--shape", metavar="SIZES", help="of one input, without the batch and with the channels: 224x224x3"
    )
    what.add_argument("--batch", type=positive, metavar="B", help="inputs at once (default: 1)")
    what.add_argument("--dtype", choices=DTYPES, help="of weights and input (default: the checkpoint's, or float32)")
    what.add_argument("--device", choices=["cpu", "cuda"], help="the device need not be there (default: cpu)")
    what.add_argument(
        "--threads", type=positive, metavar="N", help="of the predicted times (default: PyTorch's choice)"
    )
    shown = parser.add_argument_group("what is shown")
    shown.add_argument("--wide", action="store_true", help="all columns: the counted work, and perceiver-pytorch's")
    shown.add_argument("--why", action="store_true", help="also say why other ways and backends were passed over")
    shown.add_argument("--json", action="store_true", help="print JSON, with every operator of every layer")


def bench(parser: argparse.ArgumentParser) -> None:
    """Time, memory and errors beside the peers; two runs or two commits side by side; scaling curves."""
    # Whatever follows, which the command reads itself. Without prefix characters nothing looks like an option of this
    # parser, --help included.
    parser.prefix_chars = "\0"
    parser.add_argument("arguments", nargs=argparse.REMAINDER)


def profile(parser: argparse.ArgumentParser) -> None:
    """Where a model's time goes, by layer, op and kernel: torch's profiler, nsys, ncu or Linux perf."""
    parser.epilog = "Exit code: 0; 2 when the tool, the GPU or the peer is not there, or the tool fails."
    add = parser.add_argument
    add(
        "--tool",
        choices=("torch", "nsys", "ncu", "perf"),
        default="torch",
        help="torch: a table of ranges and a trace, on CPU and GPU (default). nsys: a GPU's timeline; ncu: metrics of "
        "every kernel. perf: functions on the CPU. These print their command lines and run them if they can",
    )
    workload.add_arguments(parser)
    add("--kernel", metavar="REGEX", help="of ncu: kernels to profile, or an op's name (default: all of this package)")
    add("--out", type=Path, default=Path("out"), metavar="DIR", help="where files go (default: %(default)s)")
    add("--dry-run", action="store_true", help="of nsys, ncu and perf: print the command lines, run nothing")
    add("--json", action="store_true", help="print JSON")


# In the order in which a newcomer needs them: the options, and what the command is for in a line.
COMMANDS: dict[str, tuple[Callable[[argparse.ArgumentParser], None], str]] = {
    "info": (info, "versions, build, instruction set and backends, with reasons"),
    "demo": (demo, "a photograph through perceiver-pytorch and perceiver-fast, side by side"),
    "accelerate": (
        accelerate,
        "a model of transformers or another library, made faster: what is done, and how much faster",
    ),
    "explain": (explain, "what runs every layer of a model, its predicted time and the work it saves"),
    "bench": (bench, "time, memory and errors beside the peers; two commits; scaling curves"),
    "profile": (profile, "where a model's time goes: torch's profiler, nsys or ncu"),
}


def add_options(name: str, parser: argparse.ArgumentParser) -> None:
    """Add a command's options and its description to its parser."""
    options, _ = COMMANDS[name]
    parser.description = cleandoc(options.__doc__ or "")
    options(parser)
