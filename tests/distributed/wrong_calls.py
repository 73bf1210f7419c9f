"""Wrong calls of sharded models: functions of a rank, which return the errors that it met."""

from __future__ import annotations

from typing import Any

import torch
from small import image_model, images, thirds
from torch import Tensor, nn

import perceiver_fast as pf


class Replaced(nn.Module):
    """Somebody's own layer in the place of an attention."""

    def forward(self, x: Tensor, context: Tensor, **keywords: Any) -> Tensor:
        return x + context.mean()


def refusals(rank: int, ranks: int) -> list[str]:
    """The errors of wrong calls, on this rank."""
    model = pf.distributed.shard(image_model())
    data = images(1, 2)
    errors = []

    def refused(call: Any) -> None:
        try:
            call()
            errors.append("")
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")

    refused(lambda: model(data[: 1 + (rank == 1)]))  # another batch
    refused(lambda: model(data[:, :, : 7 - (rank == 1)]))  # another width
    refused(lambda: model(data if rank else data.float()))  # another dtype, which the check refuses on one rank
    refused(lambda: model(data[:, :0]))  # nobody has tokens
    refused(lambda: model(data, mask=torch.ones(2, 3, dtype=torch.bool) if rank == 1 else None))
    refused(lambda: (model.train(rank == 0), model(data)))
    model.train()
    with torch.set_grad_enabled(rank == 0):
        refused(lambda: model(data))
    hook = model.layers[0].register_forward_pre_hook(lambda module, args, kwargs: None, with_kwargs=True)
    refused(lambda: model(data))  # it would see this rank's tokens alone
    hook.remove()
    fn = model.layers[0].cross_attn.fn
    model.layers[0].cross_attn.fn = Replaced()
    refused(lambda: model(data))  # it would attend to this rank's tokens alone
    model.layers[0].cross_attn.fn = fn
    refused(lambda: pf.explain(model, data))
    refused(lambda: pf.distributed.shard(nn.Linear(3, 3)))
    refused(lambda: pf.distributed.shard(model, "tokens"))
    refused(lambda: model(data))  # all is well again
    return errors


def one_sided(rank: int, ranks: int) -> list[str]:
    """The errors of what only one rank does, on this rank."""
    errors = []

    def refused(call: Any) -> None:
        try:
            call()
            errors.append("")
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")

    def fresh(**options: Any) -> nn.Module:
        return pf.distributed.shard(image_model(**options))

    part = images(1, 2)[:, thirds(10, rank, ranks)]
    model = fresh()
    if rank == 0:
        model.layers[0].cross_attn.fn.to_kv.register_forward_hook(lambda module, inputs, output: None)
    refused(lambda: model(part))
    model = fresh()
    if rank == 1:
        model.layers[1].eval()
    refused(lambda: model(part))
    model = fresh()
    (model.layers[0].cross_attn.fn.to_q if rank else model.layers[0].cross_attn.fn.to_kv).requires_grad_(False)
    refused(lambda: model(part))
    model = fresh().float()
    with torch.autocast("cpu", torch.bfloat16, enabled=rank == 0):
        refused(lambda: model(part.float()))
    model = fresh().requires_grad_(False)
    refused(lambda: model(part.clone().requires_grad_(rank == 0)))
    refused(
        lambda: model(pf.stream(part, transform=lambda chunk: chunk / (rank == 0 or chunk.shape[1] == 1 or fails())))
    )
    line = pf.distributed.shard(image_model(input_axis=1))
    dots = torch.zeros(2, 4, 3, dtype=torch.float64)
    refused(lambda: line(dots, coords=torch.zeros(4, 1) if rank else None))
    io = pf.distributed.shard(
        pf.PerceiverIO(depth=1, dim=9, queries_dim=7, num_latents=4, latent_dim=8).double(), shard_queries=True
    )
    data = torch.zeros(2, 4, 9, dtype=torch.float64)
    refused(lambda: io(data, queries=torch.zeros(3, 7 - rank, dtype=torch.float64)))
    refused(lambda: io(data, queries=None if rank else torch.zeros(3, 7, dtype=torch.float64)))
    wide = [
        pf.grid_tokens(
            (2, 3 + (w and rank)), num_freq_bands=1, max_freq=4.0, feat=torch.zeros(2, 3 + (w and rank), 3).double()
        )
        for w in (1, 0)
    ]
    refused(lambda: io(wide[0]))
    refused(lambda: io(wide[1]))
    return errors


def fails() -> None:
    raise OSError("the disk is gone")
