"""A model whose input is shared out to several processes: each attends to its own tokens, and one merge follows.

o = sum_r exp(lse_r - lse) o_r        N x H x (d + 1) numbers a process, however many tokens there are
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from perceiver_fast.reference.softmax import EPS, NOBODY
from perceiver_fast.shards.agreement import Place, agree, message_device, own_part, same_random_numbers
from perceiver_fast.shards.collectives import largest, local, summed


class Shard:
    """This process' place among those that share a model's inputs.

    Args:
        group: a process group of torch.distributed.
        queries: a decoder's queries are shared out, too.
    """

    def __init__(self, group: Any, queries: bool = False):
        self.group, self.queries = group, queries

    def __deepcopy__(self, memo: dict) -> Shard:
        return self  # a copied model is sharded over the same processes

    def __reduce__(self) -> tuple:
        return _unpickled, ()

    def local(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """See :func:`perceiver_fast.shards.collectives.local`."""
        return local(self.group, *tensors)

    def agree(self, model: nn.Module, look: Any) -> tuple[Any, list[Place]]:
        """See :func:`perceiver_fast.shards.agreement.agree`; in training, also draw the same random numbers."""
        device = next(model.parameters()).device
        found = agree(self.group, type(model).__name__, device, look)
        if any(module.training for module in model.modules()):
            same_random_numbers(self.group, device)
        return found

    @contextmanager
    def together(self, who: str, device: torch.device) -> Iterator[None]:
        """What raises inside on one process raises on all, at the end: a stream that cannot be read, for instance."""
        failed = torch.zeros(1, dtype=torch.int32, device=message_device(self.group, device))
        try:
            yield
        except BaseException:  # it is raised on, once the others know
            largest(self.group, failed + 1)
            raise
        if largest(self.group, failed).item():
            raise RuntimeError(f"{who}: another process failed while it read its part of the input; its error says why")

    def own(self, who: str, what: str, tensor: Any) -> Any:
        """See :func:`perceiver_fast.shards.agreement.own_part`."""
        return own_part(self.group, who, what, tensor)

    def merge(self, out: Tensor, lse: Tensor, count: int, inverted: bool) -> Tensor:
        """Attention to the tokens of all processes, from attention to this one's.

        Args:
            out: ``[B, N, H, d]``.
            lse: ``[B, N, H]``; see :func:`perceiver_fast.tokens.merging.merge_parts`.
            count: tokens of this process.
            inverted: of inverted attention.

        Returns:
            ``[B, N, H, d]``, float32 at least.
        """
        dtype = torch.float64 if out.dtype == torch.float64 else torch.float32
        if inverted:
            weight = lse.exp()
            bounded = weight.clamp_min(EPS)
        else:
            peak = largest(self.group, lse)
            bounded = weight = torch.where(peak < NOBODY, float(count), (lse - peak).exp())
        packed = torch.cat([bounded.unsqueeze(-1).to(dtype) * out.to(dtype), weight.unsqueeze(-1).to(dtype)], -1)
        (packed,) = summed(self.group, packed)
        out, total = packed[..., :-1], packed[..., -1:]
        return out / (total.clamp_min(EPS) if inverted else total)

    def summary(self, q: Tensor, k: Tensor) -> Tensor:
        """Linear attention's ``q^T softmax_M(k)`` over the tokens of all processes, for own tokens: ``[B, H, d, d]``.

        Args:
            q, k: own tokens' ``[B, H, M, d]``.
        """
        least = k.new_full((*k.shape[:2], 1, k.shape[3]), -torch.inf)  # of a process without tokens
        peak = largest(self.group, torch.cat([least, k.detach()], 2).amax(2, keepdim=True))
        weight = (k - peak).exp()
        summary, total = summed(self.group, q.transpose(-1, -2) @ weight, weight.sum(2))
        return self.local(summary / total.unsqueeze(-2))[0]

    @contextmanager
    def local_parameters(self, *modules: nn.Module | None) -> Iterator[None]:
        """Inside, ``modules`` compute with :meth:`local` parameters: they are called on this process' tokens alone."""
        places = [
            (module, name, parameter)
            for root in modules
            if root is not None
            for module in root.modules()
            for name, parameter in module._parameters.items()
            if parameter is not None
        ]
        for _, name, parameter in places:
            if type(parameter).__name__ == "DTensor":
                raise RuntimeError(
                    f"shard: expected the whole {name}, got a part of it (fully_shard): this layer is called on sharded "
                    "tokens, and gathers its parameters only then; apply fully_shard to the model alone"
                )
        parameters = list({id(parameter): parameter for *_, parameter in places}.values())
        held = dict(zip(map(id, parameters), self.local(*parameters) if parameters else ()))
        try:
            for module, name, parameter in places:
                module._parameters[name] = held[id(parameter)]  # type: ignore[assignment]
            yield
        finally:
            for module, name, parameter in places:
                module._parameters[name] = parameter


def _unpickled() -> None:
    """What a shard is in a pickle: a process group cannot be saved, and a loaded model is not sharded."""
    return None


class CalledAttention:
    """Attention to sharded tokens whose layers have to be called: it is told, and says that it asked."""

    def __init__(self, shard: Shard, first: int | None):
        self.shard, self.first, self.asked = shard, first, False


class ShardedAttention(nn.Module):
    """Base class of attention layers that can be called on this process' tokens, to attend to those of all."""

    _called: CalledAttention | None = None

    def called(self) -> CalledAttention | None:
        """What this call has to know of sharded tokens; None if it attends to all there are."""
        if self._called is not None:
            self._called.asked = True
        return self._called


@contextmanager
def calling(shard: Shard, first: int | None, *layers: nn.Module) -> Iterator[CalledAttention]:
    """Attention layers within ``layers`` attend to sharded tokens inside; ``first`` is the first one's index, if known."""
    called = CalledAttention(shard, first)
    found = [module for layer in layers for module in layer.modules() if isinstance(module, ShardedAttention)]
    try:
        for module in found:
            module._called = called
        yield called
    finally:
        for module in found:
            del module._called
