"""What the processes that share an input tell each other before a forward: sizes of their parts, and what must be alike.

One message of a few hundred bytes. If a part was refused on one process, or something differs that must not, all of them
raise: none is left waiting in a collective that the others do not enter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor

from perceiver_fast.tracing import uncompiled

MOST_INPUTS = 30  # of a model: the message has a fixed size


class Place(NamedTuple):
    """Where a process' part of an input stands along its first axis.

    Attributes:
        start: index of its first row among all rows.
        total: rows of all processes.
    """

    start: int
    total: int


class Look(NamedTuple):
    """What a process found when it looked at its part of the inputs.

    Attributes:
        sizes: rows of every input along its first axis.
        alike: what has to be the same on all processes, by name.
        found: whatever the caller wants back.
    """

    sizes: list[int]
    alike: dict[str, object]
    found: Any


def message_device(group: Any, device: torch.device) -> torch.device:
    """Where tensors that a group is to send have to be, for a model on ``device``."""
    return device if dist.get_backend(group) == "nccl" else torch.device("cpu")


@uncompiled
def agree(group: Any, who: str, device: torch.device, look: Callable[[], Look]) -> tuple[Any, list[Place]]:
    """Look at this process' part, and tell the others.

    Args:
        group: the process group.
        who: the model's name, for messages.
        device: where the model is.
        look: checks the part; what it raises is raised, on the other processes as a RuntimeError that quotes it.

    Returns:
        What ``look`` found, and a place for every size.

    Raises:
        RuntimeError: another process refused its part, or the processes differ; the message says which, and in what.
        ValueError: the inputs are empty on all processes.
    """
    error: Exception | None = None
    seen = Look([], {}, None)
    try:
        seen = look()
    except Exception as raised:  # it is raised below, after the others know
        error = raised
    facts = repr(sorted(seen.alike.items()))
    numbers = [error is None, crc32(facts.encode()), len(seen.sizes), *seen.sizes]
    sent = torch.zeros(3 + MOST_INPUTS, dtype=torch.int64, device=message_device(group, device))
    sent[: len(numbers)] = torch.tensor(numbers)
    received = [torch.empty_like(sent) for _ in range(dist.get_world_size(group))]
    dist.all_gather(received, sent, group=group)
    table = torch.stack(received).tolist()
    if not all(row[0] for row in table) or len({tuple(row[1:3]) for row in table}) > 1:
        _refuse(group, who, error, seen.alike)
    rank, places = dist.get_rank(group), []
    for sizes in list(zip(*table))[3 : 3 + len(seen.sizes)]:
        places.append(Place(sum(sizes[:rank]), sum(sizes)))
    if all(place.total == 0 for place in places):
        raise ValueError(
            f"{who}: expected at least one token on some of {len(table)} processes, got none on any; drop empty inputs "
            "before the model"
        )
    return seen.found, places


def _refuse(group: Any, who: str, error: Exception | None, alike: dict[str, object]) -> None:
    """Raise on every process: an error of its own, or what went wrong elsewhere."""
    told: list[Any] = [None] * dist.get_world_size(group)
    text = None if error is None else f"{type(error).__name__}: {error}"
    dist.all_gather_object(told, (text, {name: repr(value) for name, value in alike.items()}), group=group)
    if error is not None:
        raise error
    for rank, (failed, _) in enumerate(told):
        if failed is not None:
            raise RuntimeError(f"{who}: rank {rank} of {len(told)} refused its part of the input: {failed}")
    names = {name: None for _, facts in told for name in facts}
    differing = []
    for name in names:
        values: dict[str, list[int]] = {}
        for rank, (_, facts) in enumerate(told):
            values.setdefault(facts.get(name, "none"), []).append(rank)
        if len(values) > 1:
            said = ", ".join(f"{value} on rank {', '.join(map(str, ranks))}" for value, ranks in values.items())
            differing.append(f"{name}: {said}")
    raise RuntimeError(
        f"{who}: expected the same of all {len(told)} processes that share an input, got {'; '.join(differing)}; "
        "only sizes along the first axis of the tokens may differ"
    )


@uncompiled
def same_random_numbers(group: Any, device: torch.device) -> None:
    """Let torch's generators on all processes go on from where those of the group's first process are.

    Latents are computed on all of them, so dropout has to drop the same everywhere: what one process would.
    """
    where = message_device(group, device)
    state = torch.get_rng_state().to(where)
    dist.broadcast(state, group=group, group_src=0)
    torch.set_rng_state(state.cpu())
    if device.type == "cuda":
        state = torch.cuda.get_rng_state(device).to(where)
        dist.broadcast(state, group=group, group_src=0)
        torch.cuda.set_rng_state(state.cpu(), device)


def own_part(group: Any, who: str, what: str, tensor: Any) -> Any:
    """The local part of a DTensor that is sharded along its first axis of tokens, axis 1; anything else as it is.

    Raises:
        ValueError: the DTensor is placed in another way.
    """
    if not isinstance(tensor, Tensor) or type(tensor).__name__ != "DTensor":
        return tensor
    given: Any = tensor
    mesh, axis = given.device_mesh, 0 if what == "coords" and tensor.dim() == 2 else 1
    found = False
    for dim, placement in enumerate(given.placements):
        ranks = dist.get_process_group_ranks(mesh.get_group(dim))
        if ranks == dist.get_process_group_ranks(group):
            found = placement.is_shard(axis) and mesh.get_local_rank(dim) == dist.get_rank(group)
        elif not (placement.is_replicate() or (placement.is_shard(0) and axis != 0)):
            found = False
            break
    if not found:
        raise ValueError(
            f"{who}: expected {what} sharded along its first axis of tokens, Shard({axis}), in the order of ranks, on the mesh "
            f"that the model is sharded over, and replicated or Shard(0) on others, got {given.placements} on {mesh}; "
            "redistribute it"
        )
    return given.to_local()
