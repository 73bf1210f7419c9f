"""When a fused op may stand in for calls of modules: only while nobody could tell the difference.

A fused op takes the parameters of several modules and calls none of them. Models are full of things that the parameters
alone do not show: hooks, adapters, parametrizations, quantized or sharded weights, replaced layers, modes that count or
rewrite operations. So code that wants to compute from the parameters of modules asks two questions first:

    watcher()                 who would notice, anywhere in the process, that modules are not called? (once a block)
    why_not(name, module, ..) what does this module do beyond using its parameters? (for every module that is not called)

Both return None if fusing is allowed, else the reason in words, which ``explain`` shows. With a reason, the modules are
called one by one, on tensors, in perceiver-pytorch's order. A module for which ``why_not`` returns None is called plain.

Example:
    >>> from torch import nn
    >>> from perceiver_fast.layers.fusing import why_not
    >>> layer = nn.Linear(3, 3)
    >>> why_not("to_kv", layer, nn.Linear)
    >>> handle = layer.register_forward_hook(lambda module, inputs, output: None)
    >>> why_not("to_kv", layer, nn.Linear)
    'to_kv has a hook'
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeGuard, TypeVar

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.modules import module as torch_module
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from perceiver_fast.tracing import PLAIN, exports_onnx

# Fused ops compute with plain tensors, and with those that stand for plain tensors in a traced graph or in explain.
FUSABLE_TENSORS = frozenset((*PLAIN, FakeTensor, FunctionalTensor))
DIMENSIONS = {nn.Linear: 2, nn.LayerNorm: 1}  # how many the weight of each class has

Kind = TypeVar("Kind", bound=type[nn.Module])
Of = TypeVar("Of", bound=nn.Module)

# The original forward of every class that fused ops stand in for. If a class has another one by now, it has to be called.
_forwards: dict[type[nn.Module], Callable] = {
    kind: kind.forward for kind in (nn.Linear, nn.LayerNorm, nn.Dropout, nn.Sequential)
}
_call, _call_impl = nn.Module.__call__, nn.Module._call_impl


def fusable(kind: Kind) -> Kind:
    """Decorate a class of layers that fused ops stand in for: its forward is remembered as the original one."""
    _forwards[kind] = kind.forward
    return kind


def watcher() -> str | None:
    """Who would notice that modules are not called, or that operators differ from perceiver-pytorch's; None if nobody.

    Modes that torch itself or this package defines (a default device, fake tensors, FLOP counters) are no reason: they
    work with fused ops. Under torch.compile, the compiler handles modes.
    """
    if torch.compiler.is_compiling():
        hooked = torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks
        return "a global module hook is registered" if hooked else _tracing_watcher()
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        if (found := _global_hook()) is not None:
            return found
    if torch_module._global_backward_hooks or torch_module._global_backward_pre_hooks:
        return "a global module hook is registered"
    if torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack():
        if (found := _mode()) is not None:
            return found
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace writes down torch's operators"
    return _exchanged()


def _tracing_watcher() -> str | None:
    """What :func:`watcher` checks while torch.compile traces a graph, beside global hooks."""
    if exports_onnx():
        return "ONNX knows torch's operators alone"
    return _exchanged()


# Dynamo then evaluates the call once, while tracing. torch.compiler.assume_constant_result would set the same, but it
# imports torch._dynamo, which takes seconds.
setattr(_tracing_watcher, "_dynamo_marked_constant", True)


def _exchanged() -> str | None:
    """Which class had its forward or its call replaced, as libraries that patch others do; None if none had."""
    if nn.Module._call_impl is not _call_impl:
        return "nn.Module._call_impl was exchanged"
    for kind, forward in _forwards.items():
        if kind.forward is not forward:
            return f"{kind.__name__}.forward was exchanged"
        if not _is_own(kind.__call__):
            return f"{kind.__name__}.__call__ was exchanged"
    return None


def _is_own(call: Callable) -> bool:
    """Whether a call is nn.Module's, or what torch.export puts in its place to note which module it is in."""
    if call is _call or not torch.compiler.is_exporting():
        return call is _call
    return getattr(call, "__globals__", {}).get("__name__", "").startswith(("torch.fx.", "torch.export."))


def _global_hook() -> str | None:
    """Whether a global forward hook is registered, in words; torch's own module tracker (for FLOP counters) may be."""
    for hooks in (torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks):
        for hook in hooks.values():
            owner = getattr(hook, "__self__", None)
            if type(owner).__module__ != "torch.utils.module_tracker":
                return "a global module hook is registered"
    return None


def _mode() -> str | None:
    """The first active mode that neither torch nor this package defines, in words; None if there is none."""
    for mode in (*_get_current_function_mode_stack(), *_get_current_dispatch_mode_stack()):
        where = type(mode).__module__
        if not where.startswith(("torch.", "perceiver_fast.")) or where.startswith("torch.testing"):
            return f"{type(mode).__name__} looks on"
    return None


def is_called(module: nn.Module) -> str | None:
    """Why ``module`` has to be called, of what is set on the instance; None if nothing is.

    That is a hook, a forward of the instance's own (Hugging Face's accelerate sets one), or a compiled call. Hooks that are
    methods of an Observer (layers/observer.py, its ``only_looks`` says so) change nothing, and are no reason; neither is
    a forward that computes what the class's does (adapters/forwards.py, its ``only_accelerates`` says so).
    """
    state = module.__dict__
    for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        if not all(getattr(getattr(hook, "__self__", None), "only_looks", False) for hook in state[kind].values()):
            return "has a hook"
    if "forward" in state and not getattr(state["forward"], "only_accelerates", False):
        return "has a forward of its own"
    if state.get("_compiled_call_impl") is not None:
        return "is compiled by itself"
    return None


def why_not(name: str, module: nn.Module | None, *kinds: type[nn.Module]) -> str | None:
    """Why an op on the parameters of ``module`` may not stand in for a call of it, in words; None if it may.

    Args:
        name: what the answer calls the module.
        module: the module; None if the model has none in this place.
        kinds: classes that the op can stand in for. An instance of a subclass is not plain.
    """
    if type(module) not in kinds:
        return f"{name} is {'not there' if module is None else f'of class {type(module).__name__}'}"
    state = module.__dict__  # read directly: attribute access of nn.Module is slow, and a block asks some thirty times
    if (
        state["_forward_hooks"] or state["_forward_pre_hooks"] or state["_backward_hooks"] or state["_backward_pre_hooks"]
        or "forward" in state or "_compiled_call_impl" in state
    ):  # fmt: skip
        found = None if module is None else is_called(module)
        if found is not None:
            return f"{name} {found}"
    if type(module) in DIMENSIONS:
        parameters = state["_parameters"]
        weight, bias = parameters.get("weight"), parameters.get("bias", module)  # a missing bias is not plain, None is
        if type(weight) not in FUSABLE_TENSORS or (bias is not None and type(bias) not in FUSABLE_TENSORS):
            return f"{name} has no plain weight"
        if weight.dim() != DIMENSIONS[type(module)] or (bias is not None and bias.shape != weight.shape[:1]):
            return f"{name} has a weight or a bias of another shape"
        if state["_modules"]:
            return f"{name} has modules within"
    return None


def is_plain(module: nn.Module | None, *kinds: type[Of]) -> TypeGuard[Of]:
    """Whether ``module`` is of one of ``kinds`` and an op on its parameters may stand in for it: see :func:`why_not`."""
    return why_not("", module, *kinds) is None


def are_plain(*tensors: object) -> bool:
    """Whether all are tensors that fused ops take, or None; other subclasses of Tensor give operators other meanings."""
    for tensor in tensors:
        if tensor is not None and type(tensor) not in FUSABLE_TENSORS:
            return False
    return True


def is_watched(*tensors: object) -> bool:
    """Whether modules have to be called, whatever they are: somebody would notice, or not all tensors are plain."""
    return watcher() is not None or not are_plain(*tensors)


def hides_keywords(module: nn.Module, forward: Callable) -> bool:
    """Whether nobody but ``forward`` sees the keyword arguments that ``module`` is called with.

    A caller can then pass a description of tokens in the place of the tensor that it describes. Hooks that see only
    positional arguments and results are allowed; so are those of torch's fully_shard, which skip what is no tensor.

    Args:
        module: what is called.
        forward: the forward of a class that takes descriptions.
    """
    kind = type(module)
    if kind.forward is not forward or not _is_own(kind.__call__):
        return False
    state = module.__dict__
    if "forward" in state or state.get("_compiled_call_impl") is not None:
        return False
    seeing = [state["_forward_pre_hooks"][key] for key in state["_forward_pre_hooks_with_kwargs"]]
    seeing += [state["_forward_hooks"][key] for key in state["_forward_hooks_with_kwargs"]]
    return all(_is_sharding(hook) for hook in seeing)


def _is_sharding(hook: Callable) -> bool:
    """Whether a hook is one of torch's fully_shard."""
    function = getattr(hook, "func", hook)  # what a functools.partial calls
    owner = getattr(function, "__self__", None)
    where = getattr(function, "__module__", None) or type(owner).__module__ or ""
    return where.startswith(("torch.distributed.fsdp.", "torch.distributed._composable."))
