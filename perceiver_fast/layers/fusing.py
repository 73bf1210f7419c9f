"""When a fused op may stand in for calls of modules: only while nobody could tell.

Models are full of things that a look at the parameters does not show: hooks, adapters, parametrizations, quantized or
sharded weights, replaced layers, modes that count or rewrite operations. So whoever wants to compute something from the
parameters of modules, rather than call these, asks here first, in two steps:

    watcher()                 who looks at every call of a module or of an operator, if anybody: once a block
    why_not(name, module, ..) what makes a module more than its parameters, if anything: for every module it stands in for

Both answer None where fusing is allowed, else with the reason, which ``explain`` shows. Where one of them has an answer
the modules are called one by one, on tensors, in perceiver-pytorch's order.

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
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.modules import module as torch_module

from perceiver_fast.tracing import exports_onnx

# What fused ops compute with. The last two stand for plain tensors where something is traced, or where explain looks on.
PLAIN = frozenset((Tensor, nn.Parameter, FakeTensor, FunctionalTensor))
DIMENSIONS = {nn.Linear: 2, nn.LayerNorm: 1}  # of the weights that ops take

Kind = TypeVar("Kind", bound=type[nn.Module])

# The forward of every class that a fused op stands in for: a class whose forward somebody exchanges is called.
_forwards: dict[type[nn.Module], Callable] = {
    kind: kind.forward for kind in (nn.Linear, nn.LayerNorm, nn.Dropout, nn.Sequential)
}
_call, _call_impl = nn.Module.__call__, nn.Module._call_impl


def fusable(kind: Kind) -> Kind:
    """Decorate a class of layers that fused ops stand in for."""
    _forwards[kind] = kind.forward
    return kind


def watcher() -> str | None:
    """Who could see that modules are not called, or that other operators run than perceiver-pytorch's; None for nobody.

    Modes of torch's own (a default device, fake tensors, FLOP counters) are served: they see the fused ops. Under
    torch.compile modes are the compiler's business.
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
    if exports_onnx():
        return "ONNX knows torch's operators alone"
    return _exchanged()


# Asked while a graph is traced. What torch.compiler.assume_constant_result sets; that imports torch._dynamo: seconds.
_tracing_watcher._dynamo_marked_constant = True


def _exchanged() -> str | None:
    """That somebody put another function in the place of a class's own, as patches of libraries do."""
    if nn.Module._call_impl is not _call_impl:
        return "nn.Module._call_impl was exchanged"
    for kind, forward in _forwards.items():
        if kind.forward is not forward:
            return f"{kind.__name__}.forward was exchanged"
        if kind.__call__ is not _call:
            return f"{kind.__name__}.__call__ was exchanged"
    return None


def _global_hook() -> str | None:
    """That a global forward hook is registered, but for those by which torch's counters know where they are."""
    for hooks in (torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks):
        for hook in hooks.values():
            owner = getattr(hook, "__self__", None)
            if type(owner).__module__ != "torch.utils.module_tracker":
                return "a global module hook is registered"
    return None


def _mode() -> str | None:
    from torch.overrides import _get_current_function_mode_stack
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    for mode in (*_get_current_function_mode_stack(), *_get_current_dispatch_mode_stack()):
        where = type(mode).__module__
        if not where.startswith(("torch.", "perceiver_fast.")) or where.startswith("torch.testing"):
            return f"{type(mode).__name__} looks on"
    return None


def is_called(module: nn.Module) -> str | None:
    """What waits for a call of ``module``: a hook, or a forward or a compiled call put on the instance (accelerate does)."""
    state = module.__dict__
    for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        if not all(getattr(getattr(hook, "__self__", None), "only_looks", False) for hook in state[kind].values()):
            return "has a hook"
    if "forward" in state:
        return "has a forward of its own"
    if state.get("_compiled_call_impl") is not None:
        return "is compiled by itself"
    return None


def why_not(name: str, module: nn.Module | None, *kinds: type[nn.Module]) -> str | None:
    """What makes ``module`` more than a module of one of ``kinds`` and its parameters, or None.

    Args:
        name: what the answer calls it.
        module: the module.
        kinds: classes that an op can stand in for; a subclass is something else.
    """
    if type(module) not in kinds:
        return f"{name} is {'not there' if module is None else f'of class {type(module).__name__}'}"
    state = module.__dict__  # nn.Module's own look-ups are slow, and this is asked some thirty times a block
    if (
        state["_forward_hooks"] or state["_forward_pre_hooks"] or state["_backward_hooks"] or state["_backward_pre_hooks"]
        or "forward" in state or "_compiled_call_impl" in state
    ):  # fmt: skip
        found = is_called(module)
        if found is not None:
            return f"{name} {found}"
    if type(module) in DIMENSIONS:
        parameters = state["_parameters"]
        weight, bias = parameters.get("weight"), parameters.get("bias", module)  # a bias may be None, not be missing
        if type(weight) not in PLAIN or (bias is not None and type(bias) not in PLAIN):
            return f"{name} has no plain weight"
        if weight.dim() != DIMENSIONS[type(module)] or (bias is not None and bias.shape != weight.shape[:1]):
            return f"{name} has a weight or a bias of another shape"
        if state["_modules"]:
            return f"{name} has modules within"
    return None


def is_plain(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether ``module`` is one of ``kinds`` and nothing more."""
    return why_not("", module, *kinds) is None


def are_plain(*tensors: object) -> bool:
    """Whether all are tensors that fused ops take: no subclass, whose operations mean something else. None is."""
    return all(t is None or type(t) in PLAIN for t in tensors)


def hides_keywords(module: nn.Module, forward: Callable) -> bool:
    """Whether what ``module`` is called with by keyword is seen by ``forward`` alone.

    Then a description of tokens can be given to it in the place of the tensor that it stands for. Hooks that see
    positional arguments and results may be there, and those of fully_shard, which pass by what is no tensor.

    Args:
        module: what is called.
        forward: the forward of a class that takes descriptions.
    """
    kind = type(module)
    if kind.forward is not forward or kind.__call__ is not _call:
        return False
    state = module.__dict__
    if "forward" in state or state.get("_compiled_call_impl") is not None:
        return False
    seeing = [state["_forward_pre_hooks"][key] for key in state["_forward_pre_hooks_with_kwargs"]]
    seeing += [state["_forward_hooks"][key] for key in state["_forward_hooks_with_kwargs"]]
    return all(_is_sharding(hook) for hook in seeing)


def _is_sharding(hook: Callable) -> bool:
    function = getattr(hook, "func", hook)  # of a functools.partial
    owner = getattr(function, "__self__", None)
    where = getattr(function, "__module__", None) or type(owner).__module__ or ""
    return where.startswith(("torch.distributed.fsdp.", "torch.distributed._composable."))
