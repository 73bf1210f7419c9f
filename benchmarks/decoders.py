"""``python -m benchmarks.decoders``: decoders of described queries beside plain PyTorch, which builds them; encoders, too.

Three decoders: of a field on a grid and at points (3DShape2VecSet's, one output channel), and of optical flow; a
training step of the field's; and its encoder, which reads described points. The peer embeds the positions, normalises, projects and attends, with torch's
scaled_dot_product_attention or with an explicit softmax, the faster of the two, on the same weights. It decodes some of the
queries, in parts of 8,192, which bound its memory, and its time is scaled to all of them. Outputs are compared first.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

import perceiver_fast as pf
from benchmarks.environment import conditions
from benchmarks.options import options
from benchmarks.output import milliseconds, save, table, times_ours
from benchmarks.statistic import seconds_of
from perceiver_fast.tokens import Description

ROUNDS = 5
ROWS = 8192  # queries that the peer builds at once
SHARE = 32_768  # queries that the peer decodes
AGREE = 1e-4  # relative difference of outputs and gradients that is allowed


@dataclass
class Decoder:
    """What is timed: a model without blocks, latents in the place of its input, and described queries."""

    model: pf.PerceiverIO
    latents: Tensor
    described: Description
    trains: bool = False

    @property
    def whole(self) -> bool:
        """Whether the peer computes all of it, and not some of the queries."""
        return self.trains

    def leaves(self) -> list[Tensor]:
        """Whose gradients are computed in training."""
        modules = self.model.decoder_cross_attn, self.model.to_logits, self.described.embed
        return [p for module in modules for p in module.parameters()]

    def ours(self, queries: Description) -> Tensor:
        """Our output."""
        return self.model._decode_described(queries, self.latents)

    def plainly(self, queries: Description, fused: bool) -> Tensor:
        """The output of plain PyTorch."""
        layer, latents = self.model.decoder_cross_attn, self.latents
        fn, batch = layer.fn, len(latents)
        k, v = fn.to_kv(layer.norm_context(latents)).chunk(2, -1)
        out = []
        for part in [queries] if self.trains else queries.parts(ROWS):
            z = layer.norm(part.tensor(latents)).expand(batch, -1, -1)
            out.append(self.model.to_logits(fn.to_out(attend(fn.to_q(z), k, v, fn.scale, fused))))
        return torch.cat(out, 1)


@dataclass
class Encoder(Decoder):
    """A model's cross-attention to described data."""

    whole = True

    def leaves(self) -> list[Tensor]:
        modules = self.model.cross_attend_block.cross_attn, self.described.embed
        return [self.latents, *(p for module in modules for p in module.parameters())]

    def ours(self, data: Description) -> Tensor:
        return self.model.cross_attend_block.cross_attn(self.latents, context=data)

    def plainly(self, data: Description, fused: bool) -> Tensor:
        layer = self.model.cross_attend_block.cross_attn
        k, v = layer.fn.to_kv(layer.norm_context(data.tensor(self.latents))).chunk(2, -1)
        q = layer.fn.to_q(layer.norm(self.latents)).expand(len(k), -1, -1)
        return layer.fn.to_out(attend(q, k, v, layer.fn.scale, fused))


def vecset(queries: Callable[[nn.Linear], Description], batch: int = 1, trains: bool = False) -> Decoder:
    """A field's decoder: 512 latents, one head of 512, an embedding of 51 codes, one output."""
    embed = nn.Linear(51, 512)
    model = pf.PerceiverIO(
        depth=0, dim=512, queries_dim=512, logits_dim=1, num_latents=1, latent_dim=512, cross_dim_head=512
    )
    return Decoder(model, torch.randn(batch, 512, 512), queries(embed), trains)


def field(size: int) -> Decoder:
    """A field on a grid."""
    keywords = dict(frequencies=2.0 ** torch.arange(8), layout="vecset")
    return vecset(lambda embed: pf.grid_queries((size,) * 3, embed=embed, **keywords))


def points(count: int, batch: int = 1, trains: bool = False) -> Decoder:
    """A field at random points."""
    coords = torch.rand(batch, count, 3) * 2 - 1
    keywords = dict(frequencies=2.0 ** torch.arange(8), layout="vecset")
    return vecset(lambda embed: pf.point_queries(coords, embed=embed, **keywords), batch, trains)


def flow(height: int, width: int) -> Decoder:
    """Like optical flow's decoder: 258 position codes and 64 channels a query, 2,048 latents, 512 channels out."""
    queries = pf.grid_queries((height, width), num_freq_bands=64, max_freq=368.0, feat=torch.randn(height, width, 64))
    model = pf.PerceiverIO(
        depth=0, dim=512, queries_dim=322, logits_dim=512, num_latents=1, latent_dim=512, cross_dim_head=512
    )
    return Decoder(model, torch.randn(1, 2048, 512), queries)


def encoder(count: int, batch: int, trains: bool = False) -> Encoder:
    """3DShape2VecSet's encoder: 512 latents read points, one head of 512, an embedding of 51 codes."""
    decoder = points(count, batch, trains)
    return Encoder(decoder.model, torch.randn(1, 512, 512, requires_grad=trains), decoder.described, trains)


CASES: dict[str, tuple[Callable[[], Decoder], Callable[[], Decoder]]] = {  # as measured, and quickly
    "field, 128 x 128 x 128": (lambda: field(128), lambda: field(16)),
    "field, 262,144 points": (lambda: points(2**18), lambda: points(2**11)),
    "flow, 368 x 496": (lambda: flow(368, 496), lambda: flow(20, 30)),
    "field, step of 2,048 points x batch 16": (lambda: points(2048, 16, True), lambda: points(64, 2, True)),
    "encoder, 16,384 points": (lambda: encoder(2**14, 1), lambda: encoder(64, 1)),
    "encoder, step of 2,048 points x batch 16": (lambda: encoder(2048, 16, True), lambda: encoder(64, 2, True)),
}


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, fused: bool) -> Tensor:
    """Attention of one head, ``[B, Q, d]``."""
    if fused:
        return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], scale=scale)[:, 0]
    return ((q @ k.mT) * scale).softmax(-1) @ v


def run(decoder: Decoder, call: Callable[[], Tensor]) -> list[Tensor]:
    """The output; in training the gradients of all parameters instead."""
    if not decoder.trains:
        with torch.no_grad():
            return [call()]
    return list(torch.autograd.grad(call().square().mean(), decoder.leaves()))


def share_of(queries: Description) -> Description:
    """About :data:`SHARE` of the queries."""
    return next(queries.parts(SHARE))


def measure(decoder: Decoder, rounds: int) -> dict:
    """Medians in turns, after outputs were found to agree.

    Raises:
        RuntimeError: they do not.
    """
    some = decoder.described if decoder.whole else share_of(decoder.described)
    calls = {
        "ours": lambda: decoder.ours(decoder.described),
        "sdpa": lambda: decoder.plainly(some, True),
        "eager": lambda: decoder.plainly(some, False),
    }
    found, expected = run(decoder, lambda: decoder.ours(some)), run(decoder, calls["sdpa"])
    difference = max(((a - b).norm() / b.norm()).item() for a, b in zip(found, expected) if b.norm() > 1e-6)
    if not difference <= AGREE:
        raise RuntimeError(f"outputs differ by {difference:.1e}, more than {AGREE:.0e}: nothing was timed")
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            time = seconds_of(lambda call=call: run(decoder, call))
            if turn:
                seconds[name].append(time)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    scaled = decoder.described.count / some.count
    row = {"queries": decoder.described.count, "timed_queries_of_peer": some.count, "difference": difference}
    return row | {"ours": median["ours"], **{name: median[name] * scaled for name in ("sdpa", "eager")}}


def shown(rows: dict[str, dict]) -> list[Sequence[str]]:
    """Rows of the table."""
    return [
        (
            name,
            *(milliseconds(row[way]) for way in ("eager", "sdpa", "ours")),
            times_ours(min(row["eager"], row["sdpa"]) / row["ours"]),
            f"{row['difference']:.1e}",
        )
        for name, row in rows.items()
    ]


def parser() -> argparse.ArgumentParser:
    """All options."""
    top = options("decoders", __doc__.split("\n")[0], ROUNDS)
    top.add_argument("--case", action="append", choices=list(CASES), help="repeat for several (default: all)")
    top.add_argument("--quick", action="store_true", help="few queries, one round: does it run")
    return top


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    args = parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    result = {"conditions": conditions(args.threads)}
    rows = {}
    for name in track(args.case or list(CASES), "timing", console=Console(stderr=True)):
        rows[name] = measure(CASES[name][args.quick](), 1 if args.quick else args.rounds)
    headers = ("", "eager", "SDPA", "ours", "over the faster", "difference")
    Console().print(table(f"decoders, {args.threads} threads, float32", headers, shown(rows)))
    if args.json:
        save(args.json, result | {"rows": rows})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
