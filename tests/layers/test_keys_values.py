"""Keys and values that descriptions make of their tokens, beside those of the tokens themselves, in float64."""

import pytest
import torch
from support import needs_extension, relative_error
from torch import nn

import perceiver_fast as pf
from perceiver_fast import extension
from perceiver_fast.ops.derivatives import transformed
from perceiver_fast.tokens import DenseTokens
from perceiver_fast.tokens.describe import describe_grid, describe_points
from perceiver_fast.tokens.embedded import EmbeddedGrid, embedded_points

WIDTH = 8  # of keys and values together


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def grid(features, *sizes):
    return describe_grid(draw(2, *sizes, features), 2, 4.0)


def points():
    return describe_points(draw(2, 9, 3), draw(1, 9, 2), 2, 4.0)


def embedded(inner, width, bias):
    return EmbeddedGrid(inner, draw(width, inner.channels), draw(width) if bias else None)


KINDS = {
    "grid": lambda: grid(3, 4, 5),
    "one axis": lambda: grid(2, 7),
    "no raw channels": lambda: grid(0, 4, 3),
    "many raw channels": lambda: grid(30, 4, 5),
    "points": points,
    "dense": lambda: DenseTokens(draw(2, 9, 6)),
    "embedded grid": lambda: embedded(grid(3, 4, 5), 9, True),
    "embedded grid, as wide as before": lambda: embedded(grid(3, 4, 5), 13, False),
    "embedded grid, as wide, with a bias": lambda: embedded(grid(2, 3, 2, 4), 17, True),
    "embedded points": lambda: embedded_points(points(), draw(20, points().channels), draw(20)),
}


@pytest.mark.parametrize("learns", [False, True], ids=["tokens", "learned tokens"])
@pytest.mark.parametrize("kind", KINDS)
def test_descriptions_give_what_their_tokens_give(kind, learns):
    tokens = KINDS[kind]()
    if learns:
        tokens.feat.requires_grad_()
    norm, to_kv = nn.LayerNorm(tokens.channels), nn.Linear(tokens.channels, WIDTH, bias=False)
    for module in norm, to_kv:
        module.double()
        for parameter in module.parameters():
            parameter.data += 0.3 * draw(*parameter.shape)
    leaves = [*norm.parameters(), *to_kv.parameters(), *([tokens.feat] if learns and tokens.feat.numel() else [])]
    want = to_kv(norm(tokens.materialize()))
    found = tokens.keys_values(to_kv, norm).expand(len(want), -1, -1)
    weights = draw(*want.shape)
    for mine, theirs in zip(
        (found, *torch.autograd.grad((found * weights).sum(), leaves)),
        (want, *torch.autograd.grad((want * weights).sum(), leaves)),
        strict=True,
    ):
        assert mine.shape == theirs.shape and relative_error(mine, theirs) < 1e-9, kind


@pytest.mark.parametrize("kind", ["grid", "many raw channels", "embedded grid"])
def test_so_do_they_under_a_transform(kind):
    """Sums are not made in place there."""
    tokens = KINDS[kind]()
    norm, to_kv = nn.LayerNorm(tokens.channels).double(), nn.Linear(tokens.channels, WIDTH, bias=False).double()
    want = to_kv(norm(tokens.materialize()))

    def run(weight):
        assert transformed()
        return torch.func.functional_call(_KeysValues(to_kv, norm, tokens), {"to_kv.weight": weight}, ())

    found = torch.func.vmap(run)(torch.stack([to_kv.weight.detach(), 2 * to_kv.weight.detach()]))
    assert relative_error(found[0], want) < 1e-9 and relative_error(found[1], 2 * want) < 1e-9


class _KeysValues(nn.Module):
    def __init__(self, to_kv, norm, tokens):
        super().__init__()
        self.to_kv, self.norm, self.tokens = to_kv, norm, tokens

    def forward(self):
        return self.tokens.keys_values(self.to_kv, self.norm)


@pytest.mark.parametrize("learns", [False, True], ids=["tokens", "learned tokens"])
def test_under_autocast_dense_tokens_are_normalised_to_its_dtype(learns):
    """They are rounded as they are written, once for all layers; errors are those of rounding them afterwards."""
    torch.manual_seed(0)
    norm, to_kv = nn.LayerNorm(96), nn.Linear(96, 64, bias=False)
    feat = (3 * torch.randn(2, 500, 96) + 1).requires_grad_(learns)
    leaves = [*norm.parameters(), to_kv.weight, *([feat] if learns else [])]
    d_kv = torch.randn(2, 500, 64)

    def run(keys_values):
        kv = keys_values()
        return [t.double() for t in (kv, *torch.autograd.grad(kv, leaves, d_kv.to(kv.dtype)))]

    tokens = DenseTokens(feat)
    with torch.autocast("cpu", torch.bfloat16):
        ours = run(lambda: tokens.keys_values(to_kv, norm))
        plain = run(lambda: to_kv(norm(feat)))
        again = tokens.normalized(norm.eps, torch.bfloat16)
    truth = run(lambda: to_kv(norm(feat)))
    for found, theirs, exact in zip(ours, plain, truth, strict=True):
        assert relative_error(found, exact) <= 2 * relative_error(theirs, exact) + 1e-6
    assert tokens.normalized(norm.eps).dtype == torch.float32
    if extension.error is None:
        assert again.dtype == torch.bfloat16
        assert learns or tokens.normalized(norm.eps, torch.bfloat16) is again


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_what_inference_mode_normalised_is_not_kept_for_a_backward(dtype):
    tokens = DenseTokens(torch.randn(2, 5, 8))
    with torch.inference_mode():
        first = tokens.normalized(1e-5, dtype)
        assert tokens.normalized(1e-5, dtype) is first
    again = tokens.normalized(1e-5, dtype)
    assert torch.equal(again, first) and not again.is_inference()
    torch.nn.Linear(8, 2, dtype=again.dtype)(again).sum().backward()


@pytest.mark.skipif(**needs_extension)
def test_explain_says_what_normalises_dense_tokens():
    sizes = dict(num_freq_bands=1, depth=1, max_freq=4.0, latent_dim=256, input_channels=80, input_axis=1)
    many, few = (pf.Perceiver(**sizes, num_latents=n, fourier_encode_data=False) for n in (512, 8))
    data = torch.randn(2, 900, 80)
    with torch.autocast("cpu", torch.bfloat16):
        assert "layer_norm on cpu" in str(pf.explain(many, data)).split("layers.0")[0]  # rounded as it is written
        assert "layer_norm on torch" in str(pf.explain(few, data)).split("layers.0")[0]  # absorbed, in float32
