"""What stands in for a method of one module: an attribute of the instance that computes what the class's method computes.

Nothing else of a module changes: class, parameters, state_dict, hooks, configuration. Python looks for ``module.forward``
on the instance before the class, so ``nn.Module.__call__`` with all its hooks calls the stand-in. It holds its module, and
``copy.deepcopy`` and ``pickle`` follow that reference: a copy's stand-in belongs to the copy.

A stand-in keeps no parameter and nothing computed from one. At every call it first asks whether anybody could tell
(:meth:`StandIn.why_not`); if so, the class's own method runs, and the reason is kept for the report.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import nn

from perceiver_fast.ops.work import Work

Model = TypeVar("Model", bound=nn.Module)


class StandIn:
    """Takes the place of ``module.<method>``; subclasses say when they may and what they compute.

    Args:
        module: the module.

    Attributes:
        method: the name of the method.
        kind: what the module is, for people: "cross-attention".
        way: how the last call was computed, in words; None before the first call and where the class's method ran.
        why: why the class's own method ran in the last call; None if it did not.
        covers: whether all modules inside are computed with it, where it runs.
        work: multiply-adds, exponentials and bytes of the last call, as the class's method has them and as it was computed.
    """

    method = "forward"
    kind = "module"
    covers = False
    only_accelerates = True  # layers/fusing.py: a module with this forward is as plain as one without

    def __init__(self, module: nn.Module):
        self.module: Any = module  # of another library: what it has is asked, not declared
        self.way: str | None = None
        self.why: str | None = None
        self.work: tuple[Work, Work] | None = None
        self.known = getattr(type(module), self.method)
        self.names = tuple(inspect.signature(self.known).parameters)[1:]

    @property
    def __signature__(self) -> inspect.Signature:
        """What ``inspect.signature`` shows: the method's own arguments."""
        signature = inspect.signature(self.known)
        return signature.replace(parameters=list(signature.parameters.values())[1:])

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """A call of the class's method."""
        return getattr(type(self.module), self.method)(self.module, *args, **kwargs)

    def arguments(self, args: tuple, kwargs: dict) -> dict[str, Any]:
        """Arguments by their names in the class's method; what it has no name for comes under ``"*"``."""
        named = dict(zip(self.names, args))
        if len(args) > len(self.names):
            named["*"] = args[len(self.names) :]
        named.update(kwargs)
        return named

    def why_not(self, *_: Any, **arguments: Any) -> str | None:
        """Why the class's method has to run, in words; None if :meth:`run` may stand in for it."""
        raise NotImplementedError

    def run(self, *_: Any, **arguments: Any) -> Any:
        """What the class's method returns, computed faster."""
        raise NotImplementedError

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        arguments = self.arguments(args, kwargs)
        why = "its class's method was exchanged" if getattr(type(self.module), self.method) is not self.known else None
        why = why or self.why_not(**arguments)
        if not torch.compiler.is_compiling():
            self.why = why
            if why is not None:
                self.way = self.work = None
        return self.run(**arguments) if why is None else self.original(*args, **kwargs)

    def what(self) -> str:
        """What the module is, for people."""
        return self.kind

    def note(self, way: str, before: Work | None = None, after: Work | None = None) -> None:
        """Keep for the report how the present call is computed, and the work of the class's method and of this way."""
        if not torch.compiler.is_compiling():
            self.way = way
            self.work = None if before is None or after is None else (before, after)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {type(self.module).__name__}.{self.method}>"


def install(stand_in: StandIn) -> None:
    """Let ``stand_in`` take the place of its method."""
    object.__setattr__(stand_in.module, stand_in.method, stand_in)


def stand_ins(module: nn.Module) -> dict[str, StandIn]:
    """The stand-ins of one module, by method."""
    return {name: value for name, value in module.__dict__.items() if isinstance(value, StandIn)}


def all_stand_ins(model: nn.Module) -> Iterator[tuple[str, StandIn]]:
    """The stand-ins of a model and of all modules in it, with the name of their module."""
    for name, module in model.named_modules():
        for stand_in in stand_ins(module).values():
            yield name, stand_in


def restore(model: Model) -> Model:
    """Take all that :func:`perceiver_fast.accelerate` put on ``model`` off again.

    Args:
        model: a model or a part of one; one that was never accelerated is left as it is.

    Returns:
        The same model.

    Raises:
        TypeError: it is no module.

    Example:
        >>> import perceiver_fast as pf
        >>> from torch import nn
        >>> pf.restore(nn.Linear(2, 2))
        Linear(in_features=2, out_features=2, bias=True)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"restore: expected an nn.Module, got {type(model).__name__}; give the model itself")
    for module in model.modules():
        for name in stand_ins(module):
            object.__delattr__(module, name)
    return model
