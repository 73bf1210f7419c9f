"""``shard`` and ``unshard``: which models, over which processes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import torch.distributed as dist
from torch import nn

from perceiver_fast.shards.agreement import MOST_INPUTS
from perceiver_fast.shards.shard import Shard

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

Model = TypeVar("Model", bound=nn.Module)


def _group(mesh_or_group: Any) -> Any:
    """The process group of a mesh of one dimension, a group, or None for all processes."""
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            "shard: expected an initialised process group, got none; run under torchrun, and call "
            "torch.distributed.init_process_group() first"
        )
    if mesh_or_group is None:
        return dist.group.WORLD
    if hasattr(mesh_or_group, "get_group"):
        if mesh_or_group.ndim != 1:
            raise ValueError(
                f"shard: expected a mesh of one dimension, over which tokens are shared out, got {mesh_or_group}; name one "
                "of its dimensions, e.g. mesh['tokens']"
            )
        mesh_or_group = mesh_or_group.get_group()
    if not isinstance(mesh_or_group, dist.ProcessGroup):
        raise TypeError(
            "shard: expected a DeviceMesh of one dimension or a process group that this process is in, got "
            f"{type(mesh_or_group).__name__}"
        )
    return mesh_or_group


def _models(model: nn.Module, who: str) -> list[Any]:
    """The models of this package in ``model``, itself or within."""
    from perceiver_fast.models import MultimodalPerceiver, PerceiverIO, PerceiverLM
    from perceiver_fast.models.grid import GridPerceiver

    kinds = (GridPerceiver, MultimodalPerceiver, PerceiverIO, PerceiverLM)
    found = [module for module in model.modules() if isinstance(module, kinds)]
    if not found:
        raise TypeError(
            f"{who}: expected a model of perceiver_fast (Perceiver, its variants, PerceiverIO, PerceiverLM, "
            f"MultimodalPerceiver) or a module with one inside, got {type(model).__name__}; replace perceiver_pytorch's "
            "class by perceiver_fast's and load the state_dict"
        )
    return found


def shard(
    model: Model, mesh_or_group: DeviceMesh | ProcessGroup | None = None, *, shard_queries: bool = False
) -> Model:
    """Share a model's input tokens out to several processes: each calls ``model(part)`` with its own, and gets the whole's output.

    Every process holds the whole model. It attends to its tokens, and one sum over the processes, of N x H x (d + 1) numbers
    a cross-attention, makes that attention to all tokens: bytes sent do not depend on the number of tokens. Outputs, and
    after ``backward()`` all gradients of parameters, are those of one process that has all tokens, to rounding; gradients of
    inputs are those of the own part. All processes have to compute the same loss.

    A part is some rows along the first axis of tokens, in the order of ranks: rows of an image, frames, points, dense
    tokens; of every modality its own. Sizes may differ, and a process may have none (an axis of zero). Masks and coords are
    those of the part. A DTensor that is sharded along axis 1 is taken as its local part. In training, the random numbers of
    all processes go on from the first one's, so dropout drops what one process would.

    Args:
        model: a model of this package, or a module with some inside; its parameters have to be the same everywhere.
        mesh_or_group: a DeviceMesh of one dimension, or a process group. Default: all processes.
        shard_queries: a PerceiverIO's decoder queries are shared out, too: every process passes its own, gets their
            outputs and computes its own part of the loss, whose sum over the processes is differentiated. Default: False,
            all pass the same. (A PerceiverLM, whose tokens are its queries, does this always.)

    Returns:
        ``model``, which has been changed in place; :func:`unshard` undoes it. The state_dict is unchanged. It composes with
        DistributedDataParallel and fully_shard over another dimension of the mesh, activation checkpointing, autocast
        and torch.compile.

    Raises:
        TypeError, ValueError, RuntimeError: no model of this package, no process group, or a mesh of several dimensions. A
            forward raises on all processes if one of them refuses its part or if they disagree, in batch, dtype or other
            axes for instance.

    Source:
        Merging attention to parts of the tokens by log-sum-exps: Rabe and Staats, "Self-attention does not need O(n^2)
        memory", 2021; Liu et al., "Ring attention", 2023, which ships keys and values, as nothing does here.

    Example:
        >>> import torch, perceiver_fast as pf
        >>> torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        >>> model = pf.Perceiver(num_freq_bands=6, depth=1, max_freq=10.0, num_latents=8, latent_dim=16, num_classes=5)
        >>> image = torch.randn(1, 12, 10, 3)
        >>> whole = model(image)
        >>> bool((pf.distributed.shard(model)(image) - whole).abs().max() < 1e-5)
        True
        >>> torch.distributed.destroy_process_group()
    """
    group = _group(mesh_or_group)
    found = _models(model, "shard")
    for each in found:
        if len(getattr(each, "modalities", ())) > MOST_INPUTS:
            raise ValueError(f"shard: expected at most {MOST_INPUTS} modalities, got {len(each.modalities)}")
    from perceiver_fast.models import PerceiverLM

    inner = {id(each.perceiver_io) for each in found if isinstance(each, PerceiverLM)}
    for each in found:
        each.shard = Shard(group, shard_queries or id(each) in inner or isinstance(each, PerceiverLM))
    return model


def unshard(model: Model) -> Model:
    """Undo :func:`shard`: ``model`` takes whole inputs again.

    Args:
        model: what ``shard`` was called with.

    Raises:
        TypeError: no model of this package.
    """
    for each in _models(model, "unshard"):
        each.__dict__.pop("shard", None)
    return model
