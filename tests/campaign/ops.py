"""Random calls of every public op, forward and backward, against the reference in float64.

The yardstick is the reference backend in the dtype that is tested. A new public op needs a function of its name here.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import perceiver_fast as pf
from perceiver_fast.ops.grid_cross_attention import parameter_shapes
from perceiver_fast.ops.latent_cross_attention import parameter_shapes as side_shapes

from .judge import Judge, Results, size_of
from .outcome import Outcome
from .rounding import rounded_softmax
from .truth import right_in_float64
from .values import MASKS, draw_mask, draw_values, fill

PLAIN = {"values": "normal", "mask": "none", "dtype": "float32", "layout": "perceiver-pytorch"}
ROWS = (1, 1, 2, 3, 5, 8, 17, 33, 63, 64, 65, 130)
CHANNELS = (1, 2, 3, 4, 7, 8, 15, 16, 17, 33, 64, 96, 130)


class Make:
    """Makes the tensors of a case: the first has the case's values, all are differentiable.

    Args:
        case: says which numbers.
    """

    def __init__(self, case: dict):
        self.case, self.tensors = case, {}
        self.generator = torch.Generator().manual_seed(case["seed"])

    def harsh(self, name: str, *shape: int) -> None:
        """A tensor of the case's values."""
        self.tensors[name] = fill(self.case["values"], self.case["magnitude"], shape, self.generator)

    def normal(self, name: str, *shape: int, by: float = 1.0) -> None:
        """A tensor of normally distributed numbers times ``by``."""
        self.tensors[name] = by * torch.randn(shape, generator=self.generator)

    def positive(self, name: str, *shape: int) -> None:
        """A tensor of numbers between a half and three halves."""
        self.tensors[name] = torch.rand(shape, generator=self.generator) + 0.5

    def mask(self, *shape: int) -> Tensor | None:
        """The case's mask."""
        return draw_mask(self.case["mask"], shape, self.generator)


def grid_attention(case: dict, make: Make) -> Callable:
    """B, N, F, sizes, masked, inverted."""
    batch, rows, features, sizes = case["batch"], case["rows"], case["channels"] % 20 + 1, case["sizes"]
    tokens = torch.Size(sizes).numel()
    make.harsh("feat", batch, tokens, features)
    make.normal("q_feat", batch, rows, features, by=case["sharp"])
    for axis, size in enumerate(sizes):
        make.normal(f"q_axis{axis}", batch, rows, size, by=case["sharp"])
    make.positive("scale", batch, tokens)
    # As LayerNorm's: a token times its scale is of order one.
    make.tensors["scale"] /= make.tensors["feat"].abs().amax(-1).clamp_min(1.0)
    mask = make.mask(batch, tokens)

    def call(feat, q_feat, scale, **q_axes):
        o_feat, o_axes, lse = pf.ops.grid_attention(
            q_feat, list(q_axes.values()), feat, scale, mask, inverted=case["inverted"]
        )
        return o_feat, *o_axes, lse

    return call


def grid_query_attention(case: dict, make: Make) -> Callable:
    """B, H, N, F, C, sizes or points, masked, with and without a bias, heads apart or summed."""
    batch, heads, keys, features = case["batch"], case["heads"], case["rows"], case["channels"] % 20 + 1
    sizes = [] if case["points"] else case["sizes"]
    queries = torch.Size(case["sizes"]).numel()
    make.harsh("feat", batch, queries, features)
    make.normal("t_feat", batch, heads, keys, features, by=case["sharp"])
    for axis, size in enumerate(sizes):
        make.normal(f"t_axis{axis}", batch, heads, keys, size, by=case["sharp"])
    make.normal("v", batch, heads, keys, case["width"])
    make.positive("scale", batch, queries)
    # As LayerNorm's: a query times its scale is of order one.
    make.tensors["scale"] /= make.tensors["feat"].abs().amax(-1).clamp_min(1.0)
    if case["flag"]:
        make.normal("bias", batch, heads, keys)
    mask = make.mask(batch, keys)

    def call(feat, t_feat, v, scale, bias=None, **t_axes):
        return pf.ops.grid_query_attention(
            t_feat, list(t_axes.values()), feat, v, scale, bias, mask, sum_heads=case["inverted"]
        )

    return call


def cross_attention(case: dict, make: Make) -> Callable:
    """B, H, N, M, d, dv, masked, inverted or with lse."""
    batch, heads, rows, tokens = case["batch"], case["heads"], case["rows"], case["tokens"]
    make.harsh("v", batch, heads, tokens, case["width"])
    make.normal("q", batch, heads, rows, case["channels"], by=case["sharp"])
    make.normal("k", batch, heads, tokens, case["channels"])
    mask, with_lse = make.mask(batch, tokens), case["flag"] and not case["inverted"]
    return lambda q, k, v: pf.ops.cross_attention(q, k, v, mask, inverted=case["inverted"], return_lse=with_lse)


def fourier_projection(case: dict, make: Make) -> Callable:
    """At points or on a grid, with or without LayerNorm, both layouts."""
    axes, bands = len(case["sizes"]), case["bands"]
    tokens, features = torch.Size(case["sizes"]).numel(), case["channels"] % 20
    options = dict(num_freq_bands=bands, max_freq=case["max_freq"], layout=case["layout"])
    options["norm_eps"] = 1e-5 if case["flag"] else None
    if features:
        make.harsh("feat", case["batch"], tokens, features)
    make.normal("weight", features + axes * (2 * bands + 1), case["width"])
    make.normal("bias", case["width"])
    if case["points"]:
        make.tensors["coords"] = torch.rand(case["batch"], tokens, axes, generator=make.generator) * 2 - 1
        return lambda weight, bias, coords, feat=None: pf.ops.fourier_projection(
            coords, weight, feat=feat, bias=bias, **options
        )
    sizes = tuple(case["sizes"])
    return lambda weight, bias, feat=None: pf.ops.fourier_projection(sizes, weight, feat=feat, bias=bias, **options)


def grid_scale(case: dict, make: Make) -> Callable:
    """B, sizes, F."""
    sizes, width = case["sizes"], 2 * case["bands"] + 1
    make.harsh("feat", case["batch"], *sizes, case["channels"] % 20 + 1)
    make.normal("axis_mean", sum(sizes))
    make.positive("axis_square", sum(sizes))
    return lambda feat, axis_mean, axis_square: pf.ops.grid_scale(feat, axis_mean, axis_square, [width] * len(sizes))


def geglu(case: dict, make: Make) -> Callable:
    """Rows, 2 F, with and without a bias."""
    make.harsh("h", case["batch"], case["rows"], 2 * case["channels"])
    if case["flag"]:
        make.normal("bias", 2 * case["channels"])
    return lambda h, bias=None: pf.ops.geglu(h, bias)


def _norm(case: dict, make: Make) -> None:
    channels = case["channels"] + 1  # of one channel nothing is left, and its gradient is nothing but rounding
    make.harsh("x", case["batch"], case["rows"], channels)
    make.normal("weight", channels)
    make.normal("bias", channels)


def layer_norm(case: dict, make: Make) -> Callable:
    """Rows and channels."""
    _norm(case, make)
    return lambda x, weight, bias: pf.ops.layer_norm(x, weight, bias)


def layer_norm_linear(case: dict, make: Make) -> Callable:
    """Rows, C, D."""
    channels = case["channels"] + 1
    make.harsh("x", case["batch"], case["rows"], channels)
    make.normal("gain", channels)
    make.normal("shift", channels)
    make.normal("weight", case["width"], channels, by=channels**-0.5)
    return lambda x, gain, shift, weight: pf.ops.layer_norm_linear(x, gain, shift, weight)


def add_layer_norm(case: dict, make: Make) -> Callable:
    """Rows and channels, with a branch, with and without its bias."""
    _norm(case, make)
    make.normal("branch", case["batch"], case["rows"], case["channels"] + 1)
    if case["flag"]:
        make.normal("branch_bias", case["channels"] + 1)
    return lambda x, weight, bias, branch, branch_bias=None: pf.ops.add_layer_norm(x, branch, branch_bias, weight, bias)


def linear(case: dict, make: Make) -> Callable:
    """Rows and channels; large ones run on another library."""
    times = 8 if case["points"] else 1
    make.harsh("x", case["batch"], times * case["rows"], times * case["channels"])
    make.normal("weight", times * case["width"], times * case["channels"])
    if case["flag"]:
        make.normal("bias", times * case["width"])
    return lambda x, weight, bias=None: pf.ops.linear(x, weight, bias)


def feed_forward(case: dict, make: Make) -> Callable:
    """Rows, D, F, D'."""
    make.harsh("z", case["batch"], case["rows"], case["channels"])
    make.normal("weight1", 2 * case["tokens"], case["channels"])
    make.normal("bias1", 2 * case["tokens"])
    make.normal("weight2", case["width"], case["tokens"])
    return lambda z, weight1, bias1, weight2: pf.ops.feed_forward(z, weight1, bias1, weight2)


def latent_layers(case: dict, make: Make) -> Callable:
    """Rows, D, an attention layer of H heads, and with ``flag`` a feed-forward after it."""
    width, heads = case["channels"] + 1, case["heads"]
    inner = heads * (case["width"] % 17 + 1)
    make.harsh("x", case["batch"], case["rows"], width)
    layers = [((inner, width), (2 * inner, width), (width, inner))]
    if case["flag"]:
        layers.append(((2 * case["tokens"], width), (2 * case["tokens"],), (width, case["tokens"])))
    for i, (first, second, last) in enumerate(layers):
        for j, shape in enumerate(((width,), (width,), first, second, last, (width,))):
            make.normal(f"p{6 * i + j}", *shape, by=shape[-1] ** -0.5 if len(shape) == 2 else 1.0)
    counts, scales = [heads, 0][: len(layers)], [(inner // heads) ** -0.5, 1.0][: len(layers)]

    def call(x, **parameters):
        return pf.ops.latent_layers(x, list(parameters.values()), counts, scales, [1e-5] * len(layers))

    return call


def grid_cross_attention(case: dict, make: Make) -> Callable:
    """Rows, D, F, sizes, H, masked; gradients reach the latents and the parameters."""
    width, heads, sizes = case["channels"] + 1, case["heads"], case["sizes"]
    inner, features, own = heads * (case["width"] % 17 + 1), case["channels"] % 5 + 1, 2 * case["bands"] + 1
    channels, generator = features + own * len(sizes), make.generator
    make.harsh("x", case["batch"], case["rows"], width)
    shapes = parameter_shapes(width, inner, channels)
    for i, shape in enumerate(shapes):
        make.normal(f"p{i}", *shape, by=shape[-1] ** -0.5 if len(shape) == 2 else 1.0)
    feat = torch.randn(case["batch"], *sizes, features, generator=generator)
    codes = [torch.randn(size, own, generator=generator) for size in sizes]
    scale = torch.rand(case["batch"], *sizes, generator=generator) + 0.5
    mask = make.mask(case["batch"], feat[0, ..., 0].numel())
    mask = None if mask is None else mask.view(scale.shape)

    def call(x, **parameters):
        like = [t.to(x.dtype) for t in (feat, scale, *codes)]
        return pf.ops.grid_cross_attention(
            x, *like[:2], mask, like[2:], list(parameters.values()), heads, (inner // heads) ** -0.5, 1e-5
        )

    return call


def latent_cross_attention(case: dict, make: Make) -> Callable:
    """Rows, D, tokens, H, masked; with ``flag`` the latents are added; gradients reach all but the mask."""
    width, heads = case["channels"] + 1, case["heads"]
    inner = heads * (case["width"] % 17 + 1)
    make.harsh("x", case["batch"], case["rows"], width)
    make.normal("keys_values", case["batch"], case["tokens"], 2 * inner)
    for i, shape in enumerate(side_shapes(width, inner)):
        make.normal(f"p{i}", *shape, by=shape[-1] ** -0.5 if len(shape) == 2 else 1.0)
    mask = make.mask(case["batch"], case["tokens"])

    def call(x, keys_values, **parameters):
        return pf.ops.latent_cross_attention(
            x, keys_values, mask, list(parameters.values()), heads, (inner // heads) ** -0.5, 1e-5, adds=case["flag"]
        )

    return call


def without_empty(out: Tensor) -> Tensor:
    """Zero for the log-sum-exps of rows that are all masked, which are the least number of the dtype computed in."""
    return out.masked_fill(out <= -3e38, 0.0) if out.dtype == torch.float64 else out


def draw(seed: int) -> dict:
    """A random op, sizes and numbers."""
    r = random.Random(seed)
    axes = r.choice([1, 1, 2, 2, 3, 4])
    case = dict(
        seed=seed,
        op=r.choice(sorted(pf.ops.__all__)),
        dtype=r.choice(["float32"] * 4 + ["bfloat16"]),
        threads=r.choice([1, 1, 2, 3]),
        batch=r.choice([1, 1, 2, 3]),
        heads=r.choice([1, 2, 3]),
        rows=r.choice(ROWS),
        tokens=r.choice(ROWS),
        channels=r.choice(CHANNELS),
        width=r.choice(CHANNELS),
        sizes=[r.choice([1, 2, 3, 5, 7, 9, 16, 17, 33] if axes < 3 else [1, 2, 3, 5, 7]) for _ in range(axes)],
        bands=r.choice([0, 1, 2, 5, 16]),
        max_freq=r.choice([2.0, 10.0, 100.0]),
        layout=r.choice(["perceiver-pytorch", "deepmind"]),
        sharp=r.choice([1.0, 1.0, 10.0, 1e3]),
        mask=r.choice(MASKS),
        inverted=r.random() < 0.3,
        points=r.random() < 0.5,
        flag=r.random() < 0.5,
    )
    case |= draw_values(r)
    if case["sharp"] * case["magnitude"] > 1e5:  # larger logits have no digits left that a softmax could tell apart
        case["sharp"] = 1.0
    return case


def run(case: dict) -> Outcome:
    """Compare the op in float64 and in the case's dtype with the reference in float64."""
    outcome, dtype, make = Outcome(), getattr(torch, case["dtype"]), Make(case)
    torch.set_num_threads(case["threads"])
    call = globals()[case["op"]](case, make)
    tensors = {name: t.to(dtype).float() for name, t in make.tensors.items()}

    def results(dtype: torch.dtype, backend: str, seed: int | None = None) -> Results:
        leaves = {}
        for name, t in tensors.items():
            t = t.to(torch.promote_types(dtype, torch.float32) if name == "coords" else dtype, copy=True)
            if seed is not None and name != next(iter(tensors)):  # the harsh one stays: constants stay constant
                noise = torch.rand(t.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 0.5
                t = (t.double() * (1 + torch.finfo(dtype).eps * noise)).to(t.dtype)
            leaves[name] = t.requires_grad_()
        with pf.use_backend(backend), pf.use_linear("torch" if backend == "reference" else "auto"):
            outputs = tree_leaves(call(**leaves))
            generator = torch.Generator().manual_seed(1)
            weights = [torch.randn(out.shape, generator=generator, dtype=torch.float64) for out in outputs]
            parts = [(o * w.to(o.dtype)).sum() for o, w in zip(outputs, weights) if o.requires_grad]
            sum(parts).backward()
        found = {f"output {i}": without_empty(out.detach()) for i, out in enumerate(outputs)}
        return found | {f"gradient of {name}": t.grad for name, t in leaves.items() if t.grad is not None}

    with right_in_float64():
        truth = results(torch.float64, "reference")
    size = {f"gradient of {n}": max(1.0, size_of(t) / max(1, t.numel()) ** 0.5) for n, t in tensors.items()}

    def again(dtype: torch.dtype, seed: int) -> Results:
        with rounded_softmax(seed):
            return results(dtype, "reference", seed)

    judge = Judge(outcome, truth, size, again)
    judge.float64(results(torch.float64, "auto"))
    judge.low(results(dtype, "auto"), results(dtype, "reference"), dtype)
    outcome.counts[f"{case['op']} calls"] += 1
    return outcome
