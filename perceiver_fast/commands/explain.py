"""What runs every layer of a model on an input, its predicted time, and the work it saves beside perceiver-pytorch."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import perceiver_fast as pf
from perceiver_fast import extension
from perceiver_fast.commands import explain_table, own_model
from perceiver_fast.insight import roofs
from perceiver_fast.insight.console import CannotRun
from perceiver_fast.insight.explanation import Explanation
from perceiver_fast.insight.geometries import GEOMETRIES, Geometry
from perceiver_fast.insight.roofs import Roofs
from perceiver_fast.insight.shapes import on_shapes
from perceiver_fast.ops.linear_choice import wide_bfloat16

WAYS = "MODULE:CALLABLE, --arguments or --geometry NAME"


@dataclass(frozen=True)
class Subject:
    """A model, and what it is called with.

    Args:
        title: what people call it.
        note: where it comes from.
        model, args, kwargs: the call to explain.
        about: what JSON says of it.
    """

    title: str
    note: str
    model: nn.Module
    args: tuple
    kwargs: dict[str, Any] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code.

    Raises:
        CannotRun: no model is named, or several; it does not take the input; a forced backend cannot run it.
    """
    if args.list:
        explain_table.show_geometries([describe(geometry) for geometry in GEOMETRIES.values()], args.json)
        return 0
    if extension.error:
        print(f"explain: the C++ kernels do not run, what follows is plain PyTorch: {extension.error}", file=sys.stderr)
    threads = torch.get_num_threads()
    torch.set_num_threads(args.threads or threads)
    try:
        _explain(args, subject(args))
    except pf.BackendError as error:
        raise CannotRun(str(error)) from None
    finally:
        torch.set_num_threads(threads)
    return 0


def _explain(args: argparse.Namespace, chosen: Subject) -> None:
    try:
        found = pf.explain(chosen.model, *chosen.args, **chosen.kwargs)
    except (TypeError, ValueError) as error:
        hint = f"; --shape {args.shape} is one input's, without the batch" if args.shape else ""
        if isinstance(error, TypeError) and "expected a perceiver_fast model" in str(error):
            hint = "; models of other libraries: perceiver-fast accelerate MODULE:CALLABLE"
        raise CannotRun(f"{str(error).removeprefix('explain: ')}{hint}") from None
    except (AssertionError, RuntimeError) as error:
        if args.device != "cuda" or torch.cuda.is_available() or isinstance(error, pf.BackendError):
            raise
        raise CannotRun(
            f"{chosen.title} has a module that torch cannot run on a GPU that is not there: {error}"
        ) from None
    measured, why_not = measured_roofs(found, torch.get_num_threads())
    if args.json:
        print(json.dumps(chosen.about | {"no_roofs": why_not} | found.to_dict(measured), indent=2))
    else:
        show = explain_table.show_wide if args.wide else explain_table.show
        show(chosen.title, chosen.note, found, measured, why_not)
        if args.why:
            explain_table.show_reasons(found)


def measured_roofs(found: Explanation, threads: int) -> tuple[Roofs | None, str | None]:
    """The roofs that the counted work can be held against, or why there are none."""
    if found.device != "cpu":
        return None, f"no roofs are known for {found.device}"
    if extension.error:
        return None, f"the C++ extension measures the roofs, and is not there ({extension.error})"
    if found.dtype in ("float64", "float16"):
        return None, f"the roofs are those of float32, not {found.dtype}"
    if found.dtype == "bfloat16" and not wide_bfloat16():
        return None, "the roofs are those of float32, and this CPU multiplies bfloat16 faster"
    return roofs.measure_roofs(threads), None


def subject(args: argparse.Namespace) -> Subject:
    """The model and the input that the options name.

    Raises:
        CannotRun: they name none, or several, or they do not fit together.
    """
    given = [name for name in ("source", "arguments", "geometry") if getattr(args, name) is not None]
    if len(given) != 1:
        hint = "; --checkpoint needs the constructor's --arguments" if args.checkpoint and not given else ""
        raise CannotRun(
            f"expected one of {WAYS}, got {' and '.join(map(_typed, given)) or 'none'}{hint}; --list shows the names"
        )
    for name in ("checkpoint", "model_class"):
        if getattr(args, name) is not None and given != ["arguments"]:
            hint = "; load it in that function" if (name, given) == ("checkpoint", ["source"]) else ""
            raise CannotRun(f"{_typed(name)} goes with --arguments, got it with {_typed(given[0])}{hint}")
    chosen: Callable[[argparse.Namespace], Subject] = {
        "source": _of_source, "arguments": _of_arguments, "geometry": _of_geometry,
    }[given[0]]  # fmt: skip
    return chosen(args)


def _typed(name: str) -> str:
    return {"source": "MODULE:CALLABLE", "model_class": "--class"}.get(name, f"--{name}")


def _of_geometry(args: argparse.Namespace) -> Subject:
    if args.shape is not None:
        raise CannotRun(f"--geometry {args.geometry} has an input of its own: expected no --shape, got {args.shape}")
    geometry, batch = GEOMETRIES[args.geometry], args.batch or 1
    size = batch, *geometry.sizes, geometry.channels
    model, data = on_shapes(geometry.build, size, _dtype(args.dtype), args.device or "cpu")
    note = "; ".join(filter(None, [geometry.source, geometry.cut and f"cut: {geometry.cut}"]))
    return Subject(geometry.name, note, model, (data,), about=describe(geometry) | {"batch": batch})


def _of_arguments(args: argparse.Namespace) -> Subject:
    """A class of this package, whose checkpoint tells its dtype; weights do not matter beyond that."""
    if args.shape is None:
        raise CannotRun(
            "expected --shape with --arguments, the sizes of one input with its channels, such as 224x224x3"
        )
    name, arguments = args.model_class or "Perceiver", own_model.arguments_from(args.arguments)
    build, sizes = own_model.builder(name, arguments), own_model.sizes_from(args.shape)
    about: dict[str, Any] = {"class": name, "arguments": arguments, "sizes": sizes, "batch": args.batch or 1}
    dtype, note = torch.float32, ""
    if args.checkpoint:
        state, where = own_model.state_from(args.checkpoint)
        dtype = own_model.check_state(build, state, args.checkpoint)
        about, note = about | {"checkpoint": str(args.checkpoint)}, f"with the weights of {args.checkpoint.name}{where}"
    dtype = _dtype(args.dtype, dtype)
    model, data = on_shapes(build, (about["batch"], *sizes), dtype, args.device or "cpu")
    return Subject(name, note, model, (data,), about=about)


def _of_source(args: argparse.Namespace) -> Subject:
    """What MODULE:CALLABLE returns, as it is."""
    for name in ("dtype", "device"):
        if getattr(args, name) is not None:
            raise CannotRun(f"a model of MODULE:CALLABLE keeps its own {name}: expected no --{name}; change it there")
    model, example = own_model.made(args.source)
    if example is None and args.shape is None:
        raise CannotRun(f"{args.source} returns a model without an example: expected --shape too, such as 224x224x3")
    if example is not None:
        for name in ("shape", "batch"):
            if getattr(args, name) is not None:
                raise CannotRun(f"{args.source} returns an example of its own: expected no --{name} beside it")
        positional, keywords = own_model.call_of(model, example)
    else:
        tensors = [tensor for tensor in model.parameters() if tensor.is_floating_point()]
        like = tensors[0] if tensors else torch.empty(0)
        positional, keywords = (like.new_empty(args.batch or 1, *own_model.sizes_from(args.shape)),), {}
    shapes = [list(leaf.shape) for leaf in tree_leaves((positional, keywords)) if isinstance(leaf, Tensor)]
    about = {"source": args.source, "class": type(model).__name__, "shapes": shapes}
    return Subject(args.source, type(model).__name__, model, positional, keywords, about)


def _dtype(name: str | None, default: torch.dtype = torch.float32) -> torch.dtype:
    return default if name is None else getattr(torch, name)


def describe(geometry: Geometry) -> dict[str, Any]:
    """What JSON says of a geometry, and ``--list``."""
    names = "family", "sizes", "channels", "model", "source", "cut"
    return {"geometry": geometry.name} | {name: getattr(geometry, name) for name in names}
