"""``accelerate``: walk a model, and let stand-ins take the place of the methods they are for."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from perceiver_fast.adapters.check import check
from perceiver_fast.adapters.families import match as match_structure
from perceiver_fast.adapters.forwards import StandIn, install, stand_ins
from perceiver_fast.adapters.hugging_face_matches import match as match_hugging_face
from perceiver_fast.adapters.projected import match as match_projected
from perceiver_fast.adapters.query_key_value import match as match_query_key_value
from perceiver_fast.adapters.report import Report, Row

MATCHERS = (match_hugging_face, match_structure, match_projected, match_query_key_value)
# Names of the projections of attention in libraries, to say of what was not accelerated.
PROJECTIONS = ({"query", "key", "value"}, {"to_q", "to_kv"}, {"to_q", "to_k", "to_v"}, {"q_proj", "k_proj", "v_proj"})


def accelerate(model: nn.Module, example: Any = None) -> Report:
    """Make a Perceiver of another library faster, in place; :func:`perceiver_fast.restore` undoes it.

    Instances of modules get methods of their own, which compute from the parameters at the call what the class's compute.
    Classes, ``state_dict``, configuration, hooks, ``save_pretrained``, ``copy.deepcopy`` and ``pickle`` are as before.
    Where anybody could tell the difference (a hook or an adapter on a layer, attention weights that are asked for,
    autocast), the class's own code runs, and the report says why. A second call changes nothing.

    Args:
        model: a model of transformers' Perceiver classes or of perceiver-pytorch's, or any model with such parts; also
            attention that is built like theirs.
        example: what the model is called with, a tensor, a tuple of arguments or a dict of keywords. The model is then
            compared with the original on it, outputs and gradients, and what differs is put back. Default: no comparison.

    Returns:
        A report: print it for a table, read ``rows`` for data.

    Raises:
        TypeError: it is no module.

    Example:
        >>> import torch, perceiver_fast as pf, perceiver_pytorch
        >>> model = perceiver_pytorch.Perceiver(num_freq_bands=2, depth=1, max_freq=4.0, num_latents=4, latent_dim=8)
        >>> report = pf.accelerate(model, torch.randn(1, 6, 6, 3))
        >>> report.check.gradient_error < 1e-9
        True
        >>> [row.way for row in report.rows if row.kind == "cross-attention"]
        ['grid: grid_attention on cpu']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate: expected an nn.Module, got {type(model).__name__}; give the model itself")
    report = Report(model)
    for name, module in model.named_modules():
        if type(module).__module__.startswith("perceiver_fast.") or isinstance(module, torch.jit.ScriptModule):
            continue
        found, kind = _match(module)
        if found is None:
            if kind is not None:
                report.left.append(Row(name, kind[0], why=kind[1]))
            continue
        present = module.__dict__.get(found.method)
        if present is None:
            install(found(module))
        elif not isinstance(present, StandIn):
            report.left.append(Row(name, found.kind, why=f"it has a {found.method} of its own"))
    _leave_attention(report)
    if example is not None and report:
        report.check, back = check(model, example)
        report.left += back
    return report


def _match(module: nn.Module) -> tuple[type[StandIn] | None, tuple[str, str] | None]:
    """The stand-in for a module, or what it looks like and why it is left alone; two None for any other module."""
    for matcher in MATCHERS:
        found = matcher(module)
        if isinstance(found, tuple):
            return None, found
        if found is not None:
            return found, None
    return None, None


def _leave_attention(report: Report) -> None:
    """Name attention that no family has, and that is inside nothing accelerated or named already."""
    inside = [row.name for row in report.left]
    for name, module in report.model.named_modules():
        if any(stand_in.covers for stand_in in stand_ins(module).values()):
            inside.append(name)
        like = type(module) is nn.MultiheadAttention or any(p <= set(module._modules) for p in PROJECTIONS)
        if not like or stand_ins(module) or type(module).__module__.startswith("perceiver_fast."):
            continue
        if not any(outer == "" or name == outer or name.startswith(f"{outer}.") for outer in inside):
            report.left.append(Row(name, "attention", why=f"{type(module).__name__} is of no known family"))
