"""Code as users write it, for mypy: test_typing.py checks it with ``mypy --strict``. Nothing of it runs.

A comment ``type: ignore[..]`` stands where mypy has to find the error that it names; without that error mypy complains.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure, SubFigure
from torch import Tensor, nn
from typing_extensions import assert_type

import perceiver_fast as pf
from perceiver_fast import experimental, gated, mixed_latents, ops
from perceiver_fast.insight.explanation import Explanation
from perceiver_fast.layers import Attention, FeedForward, PreNorm
from perceiver_fast.tokens import GridDescription, PointDescription


def perceiver(images: Tensor, mask: Tensor | None, coords: Tensor, wanted: bool) -> None:
    model = pf.Perceiver(num_freq_bands=6, depth=2, max_freq=10.0, inverted_cross_attn=[False, True])
    assert_type(model(images), Tensor)
    assert_type(model.forward(images, mask, return_embeddings=True), Tensor)
    assert_type(model(images.flatten(1, 2), coords=coords), Tensor)
    logits, hiddens = model(images, return_hiddens=True)
    assert_type(logits, Tensor)
    assert_type(hiddens, list[Tensor])
    assert_type(model(images, return_hiddens=wanted), Tensor | tuple[Tensor, list[Tensor]])
    assert_type(model.eval().requires_grad_(False), pf.Perceiver)
    assert_type(model.latents, nn.Parameter)
    model(images, positions=coords)  # type: ignore[call-overload]
    pf.Perceiver(num_freq_bands=6, max_freq=10.0)  # type: ignore[call-arg]


def variants(images: Tensor) -> None:
    assert_type(gated.Perceiver(num_freq_bands=6, depth=1, max_freq=10.0)(images), Tensor)
    assert_type(mixed_latents.Perceiver(num_freq_bands=6, depth=1, max_freq=10.0)(images), Tensor)
    assert_type(experimental.Perceiver(num_freq_bands=6, depth=1, max_freq=10.0)(images), Tensor)


def decoders(data: Tensor, coords: Tensor, ids: Tensor) -> None:
    model = pf.PerceiverIO(depth=1, dim=9, queries_dim=15, logits_dim=1)
    grid = pf.grid_queries((8, 8, 8), num_freq_bands=2, max_freq=8.0)
    assert_type(grid, GridDescription)
    points = pf.point_tokens(coords, frequencies=2.0 ** torch.arange(8), embed=nn.Linear(51, 9), layout="vecset")
    assert_type(points, PointDescription)
    assert_type(model(data, queries=grid), Tensor)
    assert_type(model(points, queries=data), Tensor)
    out, hiddens = model(data, queries=points, return_hiddens=True)
    assert_type(hiddens, list[Tensor])
    field = np.zeros((1, 8, 8, 8, 1), dtype="float32")
    model.decode_into(field, data, grid, progress=True)
    model.decode_into(out, data, data)  # type: ignore[arg-type]
    language = pf.PerceiverLM(dim=12, num_tokens=50, max_seq_len=64, depth=1)
    assert_type(language(ids), Tensor)


def modalities(video: Tensor, audio: Tensor, times: Tensor, scene: dict[str, Tensor]) -> None:
    kinds = [
        pf.Modality("video", input_channels=3, input_axis=3, num_freq_bands=4, max_freq=8.0),
        pf.Modality("audio", input_channels=1, input_axis=1, num_freq_bands=8, max_freq=400.0),
    ]
    model = pf.MultimodalPerceiver(kinds, depth=1)
    assert_type(model(scene), Tensor)
    assert_type(model({"video": video, "audio": (audio, times)}, {"video": None}), Tensor)
    model(video)  # type: ignore[arg-type]
    assert_type(pf.attention_map(model, scene), dict[str, Tensor])
    assert_type(pf.attention_map(model, scene, layer=1, heads="mean"), dict[str, Tensor])
    assert_type(pf.attention_map(model, scene, "layers.0.self_attns.0.0"), Tensor | dict[str, Tensor])


def insight(model: pf.Perceiver, own: nn.Module, images: Tensor, panel: SubFigure) -> None:
    maps = pf.attention_map(model, images, latents=pf.contrasting_latents(model, images, count=3), heads="mean")
    assert_type(maps, Tensor)
    assert_type(pf.attention_map(own, images, "block.cross_attn"), Tensor)
    figure = pf.plot_attention_map(maps[0], images[0])
    assert_type(figure, Figure)
    figure.savefig("maps.png")
    assert_type(pf.plot_attention_map({"video": maps[0]}, figure=panel), SubFigure)
    found = pf.explain(model, images)
    assert_type(found, Explanation)
    assert_type(found.layers[0].choice.backend, str | None)
    assert_type(found.multiply_adds, int)
    assert_type(pf.graph(model, images)(images), Any)


def accelerated(theirs: nn.TransformerEncoder, example: dict[str, Tensor]) -> None:
    report = pf.accelerate(theirs, example)
    assert_type(report, pf.Report)
    report.check.output_error  # type: ignore[union-attr]
    if report.check is not None:
        assert_type(report.check.gradient_error, float | None)
    assert_type([row.why for row in report.rows], list[str | None])
    assert_type(pf.restore(theirs), nn.TransformerEncoder)


def settings(model: pf.Perceiver, images: Tensor) -> None:
    with pf.use_backend("reference") as forced, pf.use_linear("torch"), pf.ranges(model, kind="off"):
        assert_type(forced, pf.use_backend)
        model(images)
    assert_type(pf.backends.forced_backend(), str)
    assert_type(pf.__version__, str)
    pf.use_backend(3)  # type: ignore[arg-type]


def layers(x: Tensor, context: Tensor) -> None:
    block = pf.PerceiverBlock(dim=16, context_dim=9)
    assert_type(block(x, context), Tensor)
    assert_type(block(x, pf.point_tokens(context, num_freq_bands=2, max_freq=8.0)), Tensor)
    assert_type(Attention(8, 12, heads=2).forward(x, context=context), Tensor)
    assert_type(PreNorm(8, FeedForward(8)).forward(x), Tensor)


def operators(q: Tensor, k: Tensor, weight: Tensor, wanted: bool) -> None:
    assert_type(ops.cross_attention(q, k, k), Tensor)
    assert_type(ops.cross_attention(q, k, k, return_lse=True), tuple[Tensor, Tensor])
    assert_type(ops.cross_attention(q, k, k, return_lse=wanted), Tensor | tuple[Tensor, Tensor])
    assert_type(ops.grid_attention(q, [k, k], q, weight), tuple[Tensor, tuple[Tensor, ...], Tensor])
    assert_type(ops.grid_query_attention(None, [k], None, q), Tensor)
    assert_type(ops.fourier_projection((4, 5), weight, num_freq_bands=2, max_freq=8.0), Tensor)
    assert_type(ops.add_layer_norm(q, None, None, weight, weight), tuple[Tensor, Tensor])
    assert_type(ops.layer_norm(q, weight, weight), Tensor)
    assert_type(ops.feed_forward(q, weight, weight, weight), Tensor)
    assert_type(ops.linear(ops.geglu(q), weight), Tensor)
    assert_type(pf.reference.fourier_encode(q, weight), Tensor)
