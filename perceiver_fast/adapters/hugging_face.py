"""Hugging Face transformers' Perceiver: its layers. Preprocessors and decoders are in hugging_face_model.py.

Read from transformers 4.40 to 5.24 (``models/perceiver/modeling_perceiver.py``); 4.x has a ``head_mask`` among the
arguments, 5.x none, and the rest of these classes is the same. transformers is never imported here: classes are found by
the name of theirs.
"""

from __future__ import annotations

import sys
from math import sqrt
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from perceiver_fast.adapters.attention import Parts, cross_attention, project, queries_side, self_attention
from perceiver_fast.adapters.conditions import active_dropout, keep_of, why_dropout, why_not_now
from perceiver_fast.adapters.decoding import DescribedDecoder, plan_described
from perceiver_fast.adapters.described import built, description
from perceiver_fast.adapters.forwards import StandIn
from perceiver_fast.layers.fusing import is_called, is_plain, why_not
from perceiver_fast.layers.residual_stream import ResidualStream
from perceiver_fast.ops.linear import linear
from perceiver_fast.tokens import GridTokens

MODELING = "transformers.models.perceiver.modeling_perceiver"


def is_perceivers(module: nn.Module, *names: str) -> bool:
    """Whether a module is exactly of one of these classes of transformers' Perceiver."""
    kind = type(module)
    return kind.__module__ == MODELING and kind.__qualname__ in names


def modeling() -> ModuleType:
    """The module with transformers' Perceiver, which is imported where a model of it exists."""
    return sys.modules[MODELING]


class LayerStandIn(StandIn):
    """What the stand-ins of transformers' layers have in common.

    Attributes:
        stands_for: names of the classes whose calls are left out, beside the module's own.
    """

    stands_for: tuple[str, ...] = ()

    def __init__(self, module: nn.Module):
        super().__init__(module)
        self.forwards = {name: getattr(modeling(), name).forward for name in self.stands_for}

    def why_classes(self) -> str | None:
        """Whether somebody exchanged the forward of a class whose calls are left out."""
        for name, forward in self.forwards.items():
            if getattr(modeling(), name).forward is not forward:
                return f"{name}.forward was exchanged"
        return None

    def child(self, name: str, module: nn.Module | None, kind: str) -> str | None:
        """Why a module of transformers' class ``kind`` has to be called."""
        if module is None or not is_perceivers(module, kind):
            return f"{name} is of class {type(module).__name__}"
        found = is_called(module)
        return None if found is None else f"{name} {found}"


def why_arguments(
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    inputs: Tensor | None = None,
    inputs_mask: Tensor | None = None,
    output_attentions: bool | None = False,
    head_mask: Tensor | None = None,
    **others: Any,
) -> str | None:
    """Why a call with these arguments has to run as transformers has it."""
    if output_attentions:
        return "attention weights are asked for"
    if head_mask is not None:
        return "a head mask is given"
    if others:
        return f"unknown arguments {', '.join(others)}"
    if inputs is None and attention_mask is not None:
        return "self-attention has a mask"
    if hidden_states.dim() != 3 or 0 in hidden_states.shape:
        return f"its input is of shape {tuple(hidden_states.shape)}"
    found = why_not_now(hidden_states, inputs)
    if found is None and inputs is not None:
        if inputs.dim() != 3 or 0 in inputs.shape or inputs.shape[0] not in (1, hidden_states.shape[0]):
            return f"inputs are of shape {tuple(inputs.shape)}"
        if inputs.shape[0] != hidden_states.shape[0] or inputs.dtype != hidden_states.dtype:
            return "inputs and queries differ in batch or dtype"
    return found


def parts_of(attention: Any) -> Parts:
    """The parts of a ``PerceiverSelfAttention``."""
    modules = attention._modules
    context_norm = modules["layernorm2"]
    return Parts(
        heads=attention.num_heads,
        scale=1 / sqrt(attention.qk_channels_per_head),
        dropout=active_dropout(modules["dropout"]),
        norm=modules["layernorm1"],
        norm_context=None if type(context_norm) is nn.Identity else context_norm,
        to_q=modules["query"],
        to_kv=(modules["key"], modules["value"]),
    )


def why_attention(attention: nn.Module, inputs: Tensor | None) -> str | None:
    """Why a ``PerceiverSelfAttention`` has to run as transformers has it, whatever its arguments' values."""
    identity = type(attention._modules["layernorm2"]) is nn.Identity
    if identity != (inputs is None):
        return "its inputs are not those of its kind"
    if identity and why_not("layernorm2", attention._modules["layernorm2"], nn.Identity) is not None:
        return "layernorm2 has a hook"
    return why_dropout(attention._modules["dropout"])


class AttentionForward(LayerStandIn):
    """``PerceiverSelfAttention.forward``: attention without its matrix of weights."""

    kind = "attention"
    covers = True

    def what(self) -> str:
        return "self-attention" if type(self.inner()._modules["layernorm2"]) is nn.Identity else "cross-attention"

    def inner(self) -> nn.Module:
        """The ``PerceiverSelfAttention``."""
        return self.module

    def why_not(self, **arguments: Any) -> str | None:
        found = why_arguments(**arguments) or why_attention(self.module, arguments.get("inputs"))
        if found is None and arguments.get("inputs") is not None:
            hidden, inputs = arguments["hidden_states"], arguments["inputs"]
            batch, count = inputs.shape[:2]
            found = keep_of(arguments.get("inputs_mask"), batch, count, hidden.dtype)[1]
        return found

    def run(self, hidden_states: Tensor, inputs: Tensor | None = None, inputs_mask: Tensor | None = None, **_: Any):
        return (self.attend(parts_of(self.module), built(hidden_states), inputs, inputs_mask),)

    def attend(self, parts: Parts, x: Tensor, inputs: Tensor | None, inputs_mask: Tensor | None) -> Tensor:
        """``[B, N, H dv]`` of what asks ``x [B, N, D]``, before its norm."""
        if inputs is None:
            out, way, work = self_attention(parts, queries_side(parts, x).expand(x.shape[0], -1, -1))
        else:
            batch, count = inputs.shape[:2]
            keep, _ = keep_of(inputs_mask, batch, count, x.dtype)
            out, way, work = cross_attention(parts, queries_side(parts, x), inputs, keep)
        self.note(way, *work)
        return out


class FeedForwardForward(LayerStandIn):
    """``PerceiverMLP.forward``: two products on the fastest library."""

    kind = "feed-forward"
    covers = True

    def why_not(self, hidden_states: Tensor | None = None, **others: Any) -> str | None:
        if hidden_states is None or others:
            return "unknown arguments"
        return why_not_now(hidden_states)

    def run(self, hidden_states: Tensor) -> Tensor:
        out, bias = feed_forward(self.module, built(hidden_states))
        self.note("two products on the fastest library")
        return out if bias is None else out + bias


def feed_forward(mlp: Any, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """A ``PerceiverMLP`` without its last bias, and the bias; None where that layer has to be called."""
    modules = mlp._modules
    hidden = modules["dense1"]
    act = modules["intermediate_act_fn"] if "intermediate_act_fn" in modules else mlp.intermediate_act_fn
    hidden = act(project(hidden, x))
    last = modules["dense2"]
    if not is_plain(last, nn.Linear):
        return last(hidden), None
    return linear(hidden, last.weight), last.bias


class LayerForward(AttentionForward):
    """``PerceiverLayer.forward``: attention, its output, the residual, the norm and the feed-forward as one function."""

    kind = "layer"
    stands_for = ("PerceiverAttention", "PerceiverSelfAttention", "PerceiverSelfOutput", "PerceiverMLP")

    def why_not(self, **arguments: Any) -> str | None:
        return why_arguments(**arguments) or self.why_layer(arguments)

    def inner(self) -> nn.Module:
        return self.module._modules["attention"]._modules["self"]

    def what(self) -> str:
        return f"layer of {super().what()}"

    def why_layer(self, arguments: dict) -> str | None:
        """Why the layers inside have to be called."""
        layer, inputs = self.module, arguments.get("inputs")
        attention = layer._modules["attention"]
        found = self.why_classes() or self.child("attention", attention, "PerceiverAttention")
        if found is not None:
            return found
        inner, output = attention._modules["self"], attention._modules["output"]
        found = (
            self.child("attention.self", inner, "PerceiverSelfAttention")
            or self.child("attention.output", output, "PerceiverSelfOutput")
            or self.child("mlp", layer._modules["mlp"], "PerceiverMLP")
            or why_attention(inner, inputs)
        )
        if found is None and (layer.chunk_size_feed_forward or "feed_forward_chunk" in layer.__dict__):
            found = "its feed-forward runs in chunks"
        if found is None and inputs is not None:
            batch, count = inputs.shape[:2]
            found = keep_of(arguments.get("inputs_mask"), batch, count, arguments["hidden_states"].dtype)[1]
        return found

    def run(self, hidden_states: Tensor, inputs: Tensor | None = None, inputs_mask: Tensor | None = None, **_: Any):
        attention = self.module._modules["attention"]
        if inputs is not None and inputs_mask is None:
            decoder = self.decoder(hidden_states, built(inputs))
            if decoder is not None:
                residual = built(hidden_states) if attention.use_query_residual else None
                return (self.after(decoder.all_rows(), None, residual),)
        x = built(hidden_states)
        dense = attention._modules["output"]._modules["dense"]
        out = self.attend(parts_of(attention._modules["self"]), x, inputs, inputs_mask)
        residual = x if attention.use_query_residual else None
        if not is_plain(dense, nn.Linear):
            return (self.after(dense(out), None, residual),)
        return (self.after(linear(out, dense.weight), dense.bias, residual),)

    def decoder(self, queries: Tensor, latents: Tensor) -> DescribedDecoder | None:
        """What attends to latents by the description of the queries; None where they have none, or better are built."""
        tokens = description(queries)
        if tokens is None:
            return None
        attention = self.module._modules["attention"]
        parts, dense = parts_of(attention._modules["self"]), attention._modules["output"]._modules["dense"]
        found = why_not("norm", parts.norm, nn.LayerNorm) or why_not("query", parts.to_q, nn.Linear)
        found = found or why_not("dense", dense, nn.Linear) or parts.why_tokens()
        if found is not None or parts.norm._parameters["bias"] is None:
            return None
        _, work = plan_described(parts, dense, latents, tokens)
        if work is None or not isinstance(tokens, GridTokens):
            return None
        self.note("described queries: grid_query_attention on cpu", *work)
        return DescribedDecoder(parts, dense, latents, tokens)

    def after(self, branch: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        """What follows attention and its output layer: residual, norm, feed-forward, residual."""
        if residual is None:
            stream = ResidualStream(branch if bias is None else branch + bias)
        else:
            stream = ResidualStream(residual)
            stream.add(branch, bias)
        z = stream.normalized(self.module._modules["layernorm"])
        stream.add(*feed_forward(self.module._modules["mlp"], z))
        return stream.value()
