"""Which stand-ins transformers' Perceiver modules get."""

from __future__ import annotations

from torch import nn

from perceiver_fast.adapters.forwards import StandIn
from perceiver_fast.adapters.hugging_face import AttentionForward, FeedForwardForward, LayerForward, is_perceivers
from perceiver_fast.adapters.hugging_face_model import (
    BuildInputs,
    DecoderForward,
    ModelForward,
    MultimodalPreprocess,
    MultimodalQueries,
)

CLASSES: dict[str, type[StandIn]] = {
    "PerceiverModel": ModelForward,
    "PerceiverLayer": LayerForward,
    "PerceiverSelfAttention": AttentionForward,
    "PerceiverMLP": FeedForwardForward,
    "PerceiverImagePreprocessor": BuildInputs,
    "PerceiverAudioPreprocessor": BuildInputs,
    "PerceiverMultimodalPreprocessor": MultimodalPreprocess,
    "PerceiverBasicDecoder": DecoderForward,
    "PerceiverMultimodalDecoder": MultimodalQueries,
}


def match(module: nn.Module) -> type[StandIn] | None:
    """The stand-in for a module of transformers' Perceiver; None for any other module."""
    return CLASSES[type(module).__qualname__] if is_perceivers(module, *CLASSES) else None
