"""Single ops: what every side takes, plain PyTorch's way to compute it, and this package's.

Each function below is an op's problem of a geometry; its name is the op's, and the level's. Plain PyTorch comes first among
the sides, and is the truth on float64 inputs; a step returns the gradients of the first inputs too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from perceiver_pytorch.perceiver_pytorch import fourier_encode
from torch import Tensor

from benchmarks.sides import OURS, Case, Level, Peer, Side, compiled, leaves, ours
from benchmarks.suite.layers import one_layer
from perceiver_fast import ops
from perceiver_fast.insight.geometries import Geometry
from perceiver_fast.ops.layer_norm import add_layer_norm

EPS = 1e-5
WIDENING = 4  # of a feed-forward, perceiver-pytorch's
LANGUAGE_KEYS = 32  # channels of language's queries and keys; its values have the geometry's
PROJECTED = 128  # channels that encoded positions are projected to


@dataclass(frozen=True)
class Problem:
    """One call of an op."""

    inputs: tuple[Tensor, ...]  # that every side takes
    sides: dict[str, Callable[..., Tensor | tuple[Tensor, ...]]]  # by peer; the first is plain PyTorch, and the truth
    wanted: int  # of how many of the inputs, the first ones, a step returns the gradients
    outputs: int = 1  # of a side; the first is compared, the others are seen through the gradients


def random(*size: int, seed: int = 4) -> Tensor:
    """Standard normal numbers, the same at every call."""
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def cross_attention(geometry: Geometry, batch: int) -> Problem:
    """Streaming attention on given queries, keys and values, beside torch's and the product that builds the weights."""
    heads, channels = geometry.heads, geometry.dim_head
    keys = LANGUAGE_KEYS if geometry.name == "language" else channels
    q = random(batch, heads, geometry.queries, keys, seed=4) * keys**-0.5
    k = random(batch, heads, geometry.tokens, keys, seed=5)
    v = random(batch, heads, geometry.tokens, channels, seed=6)

    def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT).softmax(-1) @ v

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.shape[-1] < v.shape[-1]:  # torch's takes one number of channels
            q, k = (F.pad(t, (0, v.shape[-1] - t.shape[-1])) for t in (q, k))
        return F.scaled_dot_product_attention(q, k, v, scale=1.0)

    def fast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.cross_attention(q, k, v, scale=1.0)

    return Problem((q, k, v), {"eager": eager, "sdpa": sdpa, OURS: fast}, wanted=3)


def grid_query_attention(geometry: Geometry, batch: int) -> Problem:
    """A decoder's attention of the grid's queries, with raw channels, to the latents' tables, of one output; and its weights built."""
    latents, channels, axes = geometry.queries, geometry.channels, len(geometry.sizes)
    v, t_feat = random(batch, 1, latents, 1), random(batch, 1, latents, channels, seed=5) * channels**-0.5
    t_axes = [random(batch, 1, latents, size, seed=6 + axis) for axis, size in enumerate(geometry.sizes)]
    feat = geometry.input(batch).flatten(1, -2)

    def eager(v: Tensor, t_feat: Tensor, *others: Tensor) -> Tensor:
        *t_axes, feat = others
        logits = 0.0
        for axis, table in enumerate(t_axes):  # [B, 1, 1, n_a, 1, N]
            shape = [1] * axis + [table.shape[-1]] + [1] * (axes - 1 - axis)
            logits = logits + table.mT.reshape(batch, 1, *shape, latents)
        weights = (feat.unsqueeze(1) @ t_feat.mT + logits.flatten(2, -2)).softmax(-1)
        return (weights @ v).transpose(1, 2)

    def fast(v: Tensor, t_feat: Tensor, *others: Tensor) -> Tensor:
        *t_axes, feat = others
        return ops.grid_query_attention(t_feat, t_axes, feat, v)

    return Problem((v, t_feat, *t_axes, feat), {"eager": eager, OURS: fast}, wanted=2 + axes)


def fourier_projection(geometry: Geometry, batch: int) -> Problem:
    """LayerNorm of encoded positions, projected to keys and values; of points, or of samples on one axis."""
    bands, max_freq, points = geometry.model["num_freq_bands"], geometry.model["max_freq"], geometry.family == "points"
    channels = geometry.token_channels
    weight, data = random(channels, PROJECTED) * channels**-0.5, geometry.input(batch)
    axis = torch.linspace(-1.0, 1.0, geometry.tokens).view(1, -1, 1)

    def eager(weight: Tensor, data: Tensor) -> Tensor:
        codes = fourier_encode(data if points else axis.to(data), max_freq, bands).flatten(-2)
        tokens = codes if points else torch.cat([data, codes.expand(data.shape[0], -1, -1)], -1)
        return F.layer_norm(tokens, [channels], eps=EPS) @ weight

    def fast(weight: Tensor, data: Tensor) -> Tensor:
        where = {} if points else {"feat": data}
        return ops.fourier_projection(
            data if points else axis, weight, num_freq_bands=bands, max_freq=max_freq, norm_eps=EPS, **where
        )

    return Problem((weight, data), {"eager": eager, OURS: fast}, wanted=1)


def grid_scale(geometry: Geometry, batch: int) -> Problem:
    """LayerNorm's scale of tokens on a grid, beside the variance of built tokens; that is given their position codes."""
    data = geometry.input(batch)
    tokens = one_layer(geometry)[1](data)
    mean, square = (torch.cat([getattr(code, name) for code in tokens.codes]) for name in ("mean", "square"))
    widths = [code.code.shape[-1] for code in tokens.codes]
    codes = tokens.materialize()[:1, :, geometry.channels :]

    def eager(data: Tensor, mean: Tensor, square: Tensor) -> Tensor:
        built = torch.cat([data.flatten(1, -2), codes.to(data).expand(data.shape[0], -1, -1)], -1)
        return (built.var(-1, correction=0) + EPS).rsqrt().view(data.shape[:-1])

    def fast(data: Tensor, mean: Tensor, square: Tensor) -> Tensor:
        return ops.grid_scale(data, mean, square, widths, EPS)

    return Problem((data, mean, square), {"eager": eager, OURS: fast}, wanted=1)


def layer_norm(geometry: Geometry, batch: int) -> Problem:
    """A branch and its bias join the residual stream of the latents, whose LayerNorm follows: that, and the sum."""
    width = geometry.model["latent_dim"]
    x, branch = (random(batch, geometry.queries, width, seed=seed) for seed in (4, 5))
    vectors = [random(width, seed=seed) for seed in (6, 7, 8)]

    def eager(x: Tensor, branch: Tensor, branch_bias: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        y = x + (branch + branch_bias)
        return F.layer_norm(y, weight.shape, weight, bias), y

    def fast(x: Tensor, branch: Tensor, branch_bias: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return add_layer_norm(x, branch, branch_bias, weight, bias)[::-1]

    return Problem((x, branch, *vectors), {"eager": eager, OURS: fast}, wanted=5, outputs=2)


def geglu(geometry: Geometry, batch: int) -> Problem:
    """Bias and GEGLU of the wide hidden latents of a feed-forward; the bias is its linear layer's."""
    wide = WIDENING * geometry.model["latent_dim"]
    h, bias = random(batch, geometry.queries, 2 * wide), random(2 * wide, seed=5)

    def eager(h: Tensor, bias: Tensor) -> Tensor:
        values, gates = (h + bias).chunk(2, dim=-1)
        return values * F.gelu(gates)

    return Problem((h, bias), {"eager": eager, OURS: ops.geglu}, wanted=2)


def feed_forward(geometry: Geometry, batch: int) -> Problem:
    """A feed-forward's products of the latents with GEGLU between them."""
    width = geometry.model["latent_dim"]
    wide = WIDENING * width
    z, bias1 = random(batch, geometry.queries, width), random(2 * wide, seed=7)
    weight1 = random(2 * wide, width, seed=5) * width**-0.5
    weight2 = random(width, wide, seed=6) * wide**-0.5

    def eager(z: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor) -> Tensor:
        values, gates = F.linear(z, weight1, bias1).chunk(2, dim=-1)
        return F.linear(values * F.gelu(gates), weight2)

    inputs = z, weight1, bias1, weight2
    return Problem(inputs, {"eager": eager, OURS: ops.feed_forward}, wanted=4)


def linear(geometry: Geometry, batch: int) -> Problem:
    """The widest product of the latents, a feed-forward's first, on the library that was measured fastest."""
    width = geometry.model["latent_dim"]
    x, weight = random(batch, geometry.queries, width), random(2 * WIDENING * width, width, seed=5) * width**-0.5
    return Problem((x, weight), {"eager": F.linear, OURS: ops.linear}, wanted=2)


def op_level(make: Callable[[Geometry, int], Problem], others: tuple[str, ...], **options: object) -> Level:
    """The level of one op: ``others`` are measured beside ours; "compile" is torch.compile of "eager"."""

    def side_of(peer: str, dtype: torch.dtype = torch.float32) -> Callable[[Case], Side]:
        def build(case: Case) -> Side:
            problem = make(case.geometry, case.batch)
            wanted, skipped = problem.wanted if case.step else 0, problem.outputs
            inputs = [t.to(dtype) if t.is_floating_point() else t for t in problem.inputs]
            return Side(problem.sides[peer], leaves(inputs, wanted), common=lambda found: (found[0], *found[skipped:]))

        return build

    peers = {name: compiled(side_of("eager")) if name == "compile" else Peer(side_of(name)) for name in others}
    return Level(peers | {OURS: ours(side_of(OURS))}, side_of("eager", torch.float64), **options)


LEVELS = {
    "cross_attention": op_level(cross_attention, ("eager", "sdpa"), attentions=lambda geometry: 1),
    "grid_query_attention": op_level(grid_query_attention, ("eager", "compile"), attentions=lambda geometry: 1),
    "fourier_projection": op_level(fourier_projection, ("eager", "compile")),
    "grid_scale": op_level(grid_scale, ("eager", "compile")),
    "layer_norm": op_level(layer_norm, ("eager", "compile"), latents=True),
    "geglu": op_level(geglu, ("eager", "compile"), latents=True),
    "feed_forward": op_level(feed_forward, ("eager", "compile"), latents=True),
    "linear": op_level(linear, ("eager",), latents=True),
}
