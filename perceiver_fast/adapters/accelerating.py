"""``accelerate``: walk a model, and let stand-ins take the place of the methods they are for."""

from __future__ import annotations

from torch import nn

from perceiver_fast.adapters.forwards import StandIn, install, stand_ins
from perceiver_fast.adapters.hugging_face_matches import match as match_hugging_face

MATCHERS = (match_hugging_face,)


def accelerate(model: nn.Module, example: object = None):
    for module in model.modules():
        for matcher in MATCHERS:
            kind = matcher(module)
            if kind is not None and kind.method not in module.__dict__:
                install(kind(module))
                break
