"""Calls of grid_query_attention: random inputs, and what the reference makes of them."""

import math

import torch

from perceiver_fast import reference

BASE = dict(
    batch=1, shared=False, heads=1, keys=5, features=0, channels=1, sizes=(7,), grid=True, scale=True, bias=False,
    masked=False, dropout=0.0, sum_heads=False,
)  # fmt: skip
NAMES = "tables", "feat", "scale", "bias", "v"


def draw(case, dtype=torch.float64, magnitude=1.0, seed=0):
    """Inputs by name, the mask, and the gradient of the output; with several batch elements the first mask is all False."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    batch, heads, keys, features, channels, sizes = (
        case[name] for name in ("batch", "heads", "keys", "features", "channels", "sizes")
    )
    length = features + (sum(sizes) if case["grid"] else 0)
    rows = 1 if case["shared"] else batch
    inputs = dict(
        tables=randn(batch, heads, keys, length) * magnitude / math.sqrt(max(1, features)),
        feat=randn(rows, *sizes, features),
        scale=randn(rows, *sizes).abs() + 0.3 if case["scale"] else None,
        bias=randn(batch, heads, keys) * magnitude if case["bias"] else None,
        v=randn(batch, heads, keys, channels),
    )
    mask = randn(batch, keys) > -0.5 if case["masked"] else None
    if mask is not None and batch > 1:
        mask[0] = False
    queries = math.prod(sizes)
    d_o = randn(batch, queries, channels) if case["sum_heads"] else randn(batch, queries, heads, channels)
    return {name: None if t is None else t.to(dtype) for name, t in inputs.items()}, mask, d_o.to(dtype)


def plain(case, inputs, mask, seed):
    """The reference's output; dropout's seed is the one that the op draws."""
    device = inputs["v"].device
    torch.manual_seed(seed)
    drawn = torch.randint(2**62, (1,), device=device) if case["dropout"] > 0 else None
    options = case["grid"], case["dropout"], drawn, case["sum_heads"]
    return reference.grid_query_attention(*(inputs[name] for name in NAMES), mask, *options)[0]


def results(function, case, inputs, mask, d_o, seed=0):
    """The output of ``function(case, inputs, mask, seed)``, and the gradients of its product with d_o by all inputs."""
    inputs = {name: None if t is None else t.clone().requires_grad_() for name, t in inputs.items()}
    o = function(case, inputs, mask, seed)
    leaves = {name: t for name, t in inputs.items() if t is not None and t.numel() > 0}
    grads = torch.autograd.grad((o * d_o).sum(), list(leaves.values()))
    return {"o": o.detach(), **{f"d_{name}": grad for name, grad in zip(leaves, grads)}}


def errors_of(found, usual, exact):
    """Of every result the errors of a kernel's (``found``) and of plain PyTorch's, over the norm of the exact one.

    Gradients that are small beside the others, as where softmax saturates, are rounding of those.
    """
    assert found.keys() == exact.keys()
    size = torch.stack([g.norm() for g in exact.values()]).norm().item()
    pairs = {}
    for name, value in exact.items():
        assert found[name].shape == value.shape and found[name].dtype == usual[name].dtype, name
        norm = max(value.norm().item(), 1e-3 * size)
        pairs[name] = tuple((t[name].double() - value).norm().item() / norm for t in (found, usual))
    return pairs
