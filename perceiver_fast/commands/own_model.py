"""Models that people bring: what MODULE:CALLABLE returns, and a class with its arguments and a checkpoint."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import os
import pickle
import re
import sys
import textwrap
from collections.abc import Callable, Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import perceiver_fast as pf
from perceiver_fast.insight.console import CannotRun

WORDS = {"true": True, "false": False, "null": None}  # JSON's, among Python's
WITHIN = ("state_dict", "model_state_dict", "model")  # where training scripts put a model's part of a checkpoint
WRAPPERS = ("module.", "_orig_mod.")  # what DistributedDataParallel and torch.compile put before every key
ARGUMENTS = "'depth=6, num_latents=256, ..', JSON, or a .json file"


def made(source: str) -> tuple[nn.Module, Any]:
    """The model and the example, or None, that ``MODULE:CALLABLE`` returns.

    Raises:
        CannotRun: there is no such callable, or it returns something else.
    """
    module, colon, name = source.partition(":")
    if not (module and colon and name):
        raise CannotRun(f"expected MODULE:CALLABLE, such as mymodels:build, got {source!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise CannotRun(f"{source}: {error}") from None
    if not callable(found):
        raise CannotRun(f"{source}: expected something to call, got {type(found).__name__}")
    result = found()
    model, example = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
    if not isinstance(model, nn.Module):
        raise CannotRun(
            f"{source}: expected it to return a model, or a model and an example, got {type(model).__name__}"
        )
    return model, example


def call_of(model: nn.Module, example: Any) -> tuple[tuple, dict[str, Any]]:
    """Positional arguments and keywords of the call that an example stands for.

    Raises:
        CannotRun: the model's forward does not take it.
    """
    if isinstance(example, Tensor):
        return (example,), {}
    if not isinstance(example, (Mapping, list, tuple)):
        raise CannotRun(
            f"expected an example to be a tensor, a tuple of arguments or a dict, got {type(example).__name__}"
        )
    args, kwargs = ((), dict(example)) if isinstance(example, Mapping) else (tuple(example), {})
    try:
        bound = inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise CannotRun(f"the example does not fit {type(model).__name__}.forward: {error}") from None
    return bound.args, bound.kwargs


def arguments_from(text: str) -> dict[str, Any]:
    """A constructor's arguments from what was typed: ``depth=6, num_latents=256``, JSON, or the path of a JSON file.

    Raises:
        CannotRun: it is none of these.

    Example:
        >>> arguments_from("depth=6, num_latents=256, weight_tie_layers=True")
        {'depth': 6, 'num_latents': 256, 'weight_tie_layers': True}
        >>> arguments_from('{"max_freq": 10.0}')
        {'max_freq': 10.0}
    """
    try:
        if text.endswith(".json"):
            text = Path(text).read_text()
        if text.lstrip().startswith("{"):
            return json.loads(text)
        call = ast.parse(f"dict({text})", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or not all(keyword.arg for keyword in call.keywords):
            raise ValueError("a value without a name")
        return {str(keyword.arg): _literal(keyword.value) for keyword in call.keywords}
    except OSError as error:
        raise CannotRun(str(error)) from None
    except (ValueError, SyntaxError) as error:
        raise CannotRun(f"expected --arguments to be {ARGUMENTS}, got {text!r} ({error})") from None


def _literal(value: ast.expr) -> Any:
    if isinstance(value, ast.Name) and value.id in WORDS:
        return WORDS[value.id]
    return ast.literal_eval(value)


def sizes_from(text: str) -> tuple[int, ...]:
    """Sizes as they are typed: ``224x224x3``, ``224,224,3`` or ``(224, 224, 3)``.

    Raises:
        CannotRun: it is nothing of that.
    """
    numbers = re.split(r"\s*[x×,]\s*|\s+", text.strip("()[] ,"))
    if not all(number.isdecimal() and int(number) > 0 for number in numbers):
        raise CannotRun(f"expected --shape to be sizes such as 224x224x3, got {text!r}")
    return tuple(map(int, numbers))


def builder(name: str, arguments: dict[str, Any]) -> Callable[[], nn.Module]:
    """A function that makes a model of one of this package's classes.

    Raises:
        CannotRun: the class does not take these arguments.
    """
    kind = attrgetter(name)(pf)
    taken = inspect.signature(kind).parameters
    try:
        if unknown := [argument for argument in arguments if argument not in taken]:
            raise TypeError(f"there is no argument {', '.join(unknown)}")
        with torch.device("meta"):
            kind(**arguments)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        text = f"{name} does not take these --arguments: {str(error).removeprefix(f'{name}.__init__() ')}"
        raise CannotRun(f"{text}. It takes {', '.join(taken)}") from None
    return lambda: kind(**arguments)


def state_from(path: Path) -> tuple[dict[str, Tensor], str]:
    """The state_dict of a checkpoint, also from within what a training script saved, and where it was in words.

    Raises:
        CannotRun: the file cannot be read, or holds no state_dict.
    """
    expected = "expected a file that torch.save(model.state_dict(), ..) wrote"
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CannotRun(f"the checkpoint cannot be read: {error}") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError):  # whose texts recommend to load anything
        raise CannotRun(f"{path}: {expected}, got another file, or one of more than tensors") from None
    where = ""
    if isinstance(found, Mapping):
        name = next((name for name in WITHIN if isinstance(found.get(name), Mapping)), None)
        if name is not None:
            found, where = found[name], f", which are under {name!r} in the file"
    if not isinstance(found, Mapping) or not any(isinstance(value, Tensor) for value in found.values()):
        got = f"keys {', '.join(map(str, list(found)[:5]))}" if isinstance(found, Mapping) else type(found).__name__
        raise CannotRun(f"{path}: {expected}, got {got}")
    for wrapper in WRAPPERS:
        if all(key.startswith(wrapper) for key in found):
            found = {key.removeprefix(wrapper): value for key, value in found.items()}
            where += f", whose keys begin with {wrapper!r} (remove it before load_state_dict)"
    return dict(found), where


def check_state(build: Callable[[], nn.Module], state: dict[str, Tensor], path: Path) -> torch.dtype:
    """The dtype of a checkpoint.

    Raises:
        CannotRun: it is not of the model that ``build`` makes.
    """
    with torch.device("meta"):
        model = build()
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        found = textwrap.shorten(str(error).partition(":")[2], 300, placeholder=" ..")
        raise CannotRun(f"{path} is not of a model with these --arguments: {found}") from None
    dtypes = [value.dtype for value in state.values() if isinstance(value, Tensor) and value.is_floating_point()]
    return dtypes[0] if dtypes else torch.float32
