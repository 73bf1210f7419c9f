"""Random models with inputs, and how the inputs are shared out to processes."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import perceiver_fast as pf
from perceiver_fast import experimental, gated, mixed_latents

SMALL = dict(num_latents=5, latent_dim=12, latent_heads=2, latent_dim_head=5, cross_dim_head=6)
KINDS = (
    "axis", "long axis", "image", "video", "points", "bare points", "dense", "gated", "mixed latents", "experimental",
    "multimodal", "io", "io described", "io queries", "io sharded queries", "lm",
)  # fmt: skip


@dataclass
class Case:
    """A model, what it is called with, and a rank's part of that.

    Attributes:
        name: for messages.
        model: of one process.
        call: the model on a rank's part, of rows start to stop; of all with (0, rows).
        rows: tokens along the first axis.
        inputs: tensors that gradients are compared of, cut along axis 1.
        own_output: whether a rank's output is of its own rows.
        shard_queries: of ``shard``.
        needs_rows: every rank has to have some.
    """

    name: str
    model: nn.Module
    call: Callable[[nn.Module, int, int], Tensor]
    rows: int
    inputs: list[Tensor]
    own_output: bool = False
    shard_queries: bool = False
    needs_rows: bool = False


def cuts(case: Case, ranks: int, choose: random.Random) -> list[tuple[int, int]]:
    """Rows of every rank, ragged; often some rank has none."""
    least = int(case.needs_rows)
    inner = range(least, case.rows - least + 1)
    at = sorted(choose.sample(inner, ranks - 1) if least else choose.choices(inner, k=ranks - 1))
    return list(zip([0, *at], [*at, case.rows]))


def make_case(seed: int, kind: str | None = None, dtype: torch.dtype = torch.float64) -> Case:
    """A case by its seed, the same in every process."""
    choose = random.Random(seed)
    kind = kind or choose.choice(KINDS)
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    batch = choose.choice((1, 2, 3))
    drops = choose.random() < 0.4
    options: dict[str, Any] = dict(
        SMALL,
        num_freq_bands=choose.choice((1, 3)),
        max_freq=8.0,
        depth=choose.choice((1, 2)),
        cross_heads=choose.choice((1, 2)),
        num_classes=3,
        attn_dropout=0.3 if drops else 0.0,
        ff_dropout=0.2 if drops else 0.0,
    )
    inverted = choose.random() < 0.3
    learns = choose.random() < 0.7
    masked = choose.random() < 0.6
    name = f"{seed} {kind}, batch {batch}, {'dropout, ' if drops else ''}{'inverted, ' if inverted else ''}{'mask' if masked else ''}"

    def mask_of(*sizes: int) -> Tensor | None:
        if not masked:
            return None
        mask = torch.rand(batch, *sizes, generator=generator) < 0.6
        if choose.random() < 0.5:
            mask[0] = False
        return mask

    def part(t: Tensor | None, start: int, stop: int, axis: int = 1) -> Tensor | None:
        return None if t is None else t.narrow(axis, start, stop - start)

    if kind in ("io", "io described", "io queries", "io sharded queries", "lm"):
        return _io_case(kind, name, batch, inverted, numbers, mask_of, part, choose, dtype, options, learns)
    if kind == "multimodal":
        return _multimodal_case(name, batch, options, numbers, masked, generator, dtype, choose, learns)
    sizes = {"axis": (23,), "long axis": (1100,), "image": (9, 7), "video": (5, 4, 3)}.get(kind, (9, 7))
    coords = None
    kinds: dict[str, Any] = {
        "gated": gated.Perceiver,
        "mixed latents": mixed_latents.Perceiver,
        "experimental": experimental.Perceiver,
    }
    cls = kinds.get(kind, pf.Perceiver)
    if kind == "experimental":
        options.update(attn_dropout=0.0, ff_dropout=0.0)
        sizes = (9, 7)
    if cls is pf.Perceiver:
        options.update(
            inverted_cross_attn=inverted,
            weight_tie_layers=choose.random() < 0.5,
            checkpoint=choose.random() < 0.3,
            attn_residual=choose.random() < 0.2,
            self_per_cross_attn=choose.choice((0, 1)),
        )
    channels = 2
    if kind in ("points", "bare points"):
        sizes = (31,)
        channels = 0 if kind == "bare points" else 2
        coords = numbers(batch, 31, 2).tanh() if choose.random() < 0.7 else numbers(31, 2).tanh()
    if kind == "dense":
        options.update(fourier_encode_data=False)
        channels = 6
    if kind == "image" and choose.random() < 0.2:
        options.update(num_freq_bands=0)
    axes = 2 if coords is not None else len(sizes)
    model = cls(**options, input_channels=channels, input_axis=axes).to(dtype)
    data, mask = numbers(batch, *sizes, channels).requires_grad_(learns), mask_of(*sizes)

    def call(model: nn.Module, start: int, stop: int) -> Tensor:
        own: dict[str, Any] = {} if coords is None else dict(coords=part(coords, start, stop, coords.dim() - 2))
        return model(part(data, start, stop), mask=part(mask, start, stop), **own)

    return Case(name, model, call, sizes[0], [data] if learns else [], needs_rows=kind == "experimental")


def _io_case(kind, name, batch, inverted, numbers, mask_of, part, choose, dtype, options, learns) -> Case:
    small = {name: value for name, value in options.items() if name in (*SMALL, "depth", "cross_heads")}
    if kind == "lm":
        model = pf.PerceiverLM(dim=8, num_tokens=11, max_seq_len=40, inverted_cross_attn=inverted, **small).to(dtype)
        ids, mask = torch.randint(0, 11, (batch, 29)), mask_of(29)
        return Case(name, model, lambda m, a, b: m(part(ids, a, b), mask=part(mask, a, b)), 29, [], own_output=True)
    width, mask = 9, mask_of(26)
    queries = None
    if kind == "io described":
        width = 16
        embed = nn.Linear(2 + 2 * 3, width).to(dtype)
        coords, feat = numbers(1, 26, 2).tanh(), numbers(batch, 26, 2)
    model = pf.PerceiverIO(
        dim=width, queries_dim=7, logits_dim=3, decoder_ff=choose.random() < 0.5, inverted_cross_attn=inverted,
        seq_dropout_prob=0.4 if mask is None and kind == "io" else 0.0, **small,
    ).to(dtype)  # fmt: skip
    if kind == "io described":
        model.embed = embed
    data = numbers(batch, 26, width).requires_grad_(learns)
    if kind != "io":
        queries = numbers(batch, 26, 7)

    def call(m: nn.Module, a: int, b: int) -> Tensor:
        asked = queries
        if kind == "io sharded queries":
            asked = part(queries, a, b)
        given: Any = part(data, a, b)
        if kind == "io described":
            given = pf.point_tokens(coords[:, a:b], num_freq_bands=1, max_freq=4.0, feat=feat[:, a:b], embed=m.embed)
        return m(given, mask=part(mask, a, b), queries=asked)

    own = kind == "io sharded queries"
    inputs = [data] if learns and kind != "io described" else []
    return Case(name, model, call, 26, inputs, own_output=own, shard_queries=own)


def _multimodal_case(name, batch, options, numbers, masked, generator, dtype, choose, learns) -> Case:
    modalities = [
        pf.Modality("video", 3, 3, 1, 4.0),
        pf.Modality("audio", 1, 1, 2, 40.0),
        pf.Modality("dots", 2, 2, 1, 4.0),
    ]
    for unused in ("num_freq_bands", "max_freq"):
        options.pop(unused)
    model = pf.MultimodalPerceiver(modalities, **options).to(dtype)
    rows = 12
    video, audio, dots = numbers(batch, 12, 2, 3, 3), numbers(batch, 36, 1), numbers(batch, 24, 2)
    video.requires_grad_(learns)
    coords = numbers(24, 2).tanh()
    mask = torch.rand(batch, 36, generator=generator) < 0.5 if masked else None

    def call(m: nn.Module, a: int, b: int) -> Tensor:
        given = {
            "video": video[:, a:b],
            "audio": audio[:, 3 * a : 3 * b],
            "dots": (dots[:, 2 * a : 2 * b], coords[2 * a : 2 * b]),
        }
        return m(given, mask=None if mask is None else {"audio": mask[:, 3 * a : 3 * b]})

    return Case(name, model, call, rows, [video] if learns else [])
