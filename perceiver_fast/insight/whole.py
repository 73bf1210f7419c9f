"""Models that are looked at take whole inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from perceiver_fast.tokens import Stream


def check_whole(who: str, model: nn.Module, data: Any) -> None:
    """Raise unless a model that is to be looked at takes its whole input, at once.

    Raises:
        ValueError: it is sharded, or the data is a stream; the message says what to do.
    """
    if any(getattr(module, "shard", None) is not None for module in model.modules()):
        raise ValueError(
            f"{who}: expected a model that takes whole inputs, got a sharded one; call it before shard, or on "
            "pf.distributed.unshard(copy.deepcopy(model))"
        )
    given = data.values() if isinstance(data, Mapping) else [data]
    if any(isinstance(each, Stream) for each in given):
        raise ValueError(f"{who}: expected a tensor, got a stream; call it on some of its rows")
