"""A small model's cross-attention to a grid against plain PyTorch in float64: values, gradients, and what is refused."""

import pytest
import torch
from support import check_over_draws, needs_extension, relative_error

import perceiver_fast as pf
from perceiver_fast import reference
from perceiver_fast.ops import grid_cross_attention
from perceiver_fast.ops.grid_cross_attention import grid_cross_attention_unchecked

ALONE = -1


def operands(batch, latents, width, heads, dim, sizes, features, dtype, shared=False, masked=False, seed=0, mean=False):
    """All arguments of the op: latents, tokens, parameters and options."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        numbers = torch.randn(shape, generator=generator, dtype=torch.float64)
        return (numbers * shape[-1] ** -0.5 if len(shape) == 2 else numbers).to(dtype)

    inner, code, axes = heads * dim, 5, len(sizes)
    if features == ALONE:  # tokens of no axis, which are normalised
        features, axes = 12, 0
    channels = features - mean + code * axes
    shapes = (
        (width,),
        (width,),
        (inner, width),
        (channels,),
        (channels,),
        (2 * inner, channels),
        (width, inner),
        (width,),
    )
    mask = draw(batch, *sizes) > -0.3 if masked else None
    if masked and batch > 1:
        mask[0] = False
    tokens = draw(batch, *sizes, features), draw(batch, *sizes).abs() + 0.3, mask, [draw(size, code) for size in sizes]
    if axes == 0:
        feat = tokens[0] - tokens[0].mean(-1, keepdim=True)
        tokens = (feat / feat.std(-1, keepdim=True, unbiased=False)).to(dtype), None, mask, []
    parameters = [draw(*shape) for shape in shapes]
    return draw(1 if shared else batch, latents, width), *tokens, parameters, heads, dim**-0.5, 1e-5


def in_float64(value):
    if isinstance(value, list):
        return [in_float64(each) for each in value]
    return value.double() if torch.is_tensor(value) and value.is_floating_point() else value


def results(run, x, feat, scale, mask, codes, parameters, *options):
    tensors = [t.clone().requires_grad_() for t in (x, *parameters)]
    out = run(tensors[0], feat, scale, mask, codes, tensors[1:], *options)
    d_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(out.dtype)
    return [out, *torch.autograd.grad(out, tensors, d_out)]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shared", [False, True], ids=["own latents", "shared latents"])
@pytest.mark.parametrize(
    "shape, sizes, features, masked, mean",
    [
        ((2, 4, 7, 2, 3), (5, 4), 3, False, False),
        ((3, 1, 8, 1, 4), (9,), 1, True, False),
        ((7, 16, 32, 1, 64), (8, 8), 3, False, False),
        ((70, 5, 16, 2, 8), (3, 4), 2, True, False),  # many chunks, whose gradients are summed in parts
        ((2, 33, 20, 3, 5), (3, 2, 5), 4, False, False),
        ((3, 6, 12, 2, 8), (4, 3), 18, True, True),  # the last channel is the mean of the others
        ((3, 6, 12, 2, 8), (30,), ALONE, True, False),
        ((50, 5, 7, 1, 64), (70,), ALONE, False, False),
        ((2, 33, 20, 3, 5), (700,), ALONE, False, False),
    ],
)
def test_values_and_gradients(shape, sizes, features, masked, mean, shared, dtype, backend):
    floor = {torch.float64: 1e-13, torch.float32: 3e-7}[dtype]
    rows = []
    for seed in range(6):
        low = operands(*shape, sizes, features, dtype, shared, masked, seed, mean)
        want = results(reference.grid_cross_attention, *(in_float64(value) for value in low))
        theirs = results(reference.grid_cross_attention, *low)
        with pf.use_backend(backend):
            got = results(grid_cross_attention, *low)
        for i, (mine, other, exact) in enumerate(zip(got, theirs, want)):
            assert mine.dtype == dtype and mine.shape == exact.shape
            rows.append((i, relative_error(mine, exact), relative_error(other, exact)))
    check_over_draws(rows, floor)


@pytest.mark.skipif(**needs_extension)
def test_no_bit_depends_on_the_number_of_threads_or_on_gradients():
    arguments = operands(40, 16, 32, 2, 16, (8, 8), 3, torch.float32)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(results(grid_cross_attention, *arguments))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))
    assert torch.equal(grid_cross_attention(*arguments), found[0][0])


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("shared", [False, True], ids=["own latents", "shared latents"])
def test_dropout_drops_what_the_reference_drops(shared, backend):
    low, seed = operands(3, 9, 16, 2, 8, (5, 4), 3, torch.float64, shared, masked=True), torch.tensor([7])

    def dropping(run):
        return lambda *arguments: run(*arguments, dropout=0.3, seed=seed)

    want = results(dropping(reference.grid_cross_attention), *low)
    with pf.use_backend(backend):
        got = results(dropping(grid_cross_attention_unchecked), *low)
    for mine, exact in zip(got, want):
        assert relative_error(mine, exact) < 1e-12
    torch.manual_seed(3)
    first = grid_cross_attention(*low, dropout=0.3)
    assert not torch.equal(first, grid_cross_attention(*low, dropout=0.3))
    torch.manual_seed(3)
    assert torch.equal(first, grid_cross_attention(*low, dropout=0.3))
    with pytest.raises(ValueError, match="no dropout"):
        grid_cross_attention(*operands(2, 3, 8, 2, 3, (20,), ALONE, torch.float32), dropout=0.1)
    with pytest.raises(ValueError, match="dropout probability"):
        grid_cross_attention(*low, dropout=1.0)


def test_second_derivatives():
    x, *tokens, parameters, heads, scale, eps = operands(2, 3, 4, 2, 2, (3, 2), 2, torch.float64, masked=True)
    tensors = [t.requires_grad_() for t in (x, *parameters)]

    def run(x, *parameters):
        return grid_cross_attention(x, *tokens, parameters, heads, scale, eps)

    assert torch.autograd.gradgradcheck(run, tensors)


@pytest.mark.parametrize(
    "place, change, match",
    [
        (0, lambda x: x[0], "latents x"),
        (0, lambda x: torch.cat([x, x]), "the same batch"),
        (1, lambda feat: feat.double(), "like x"),
        (2, lambda scale: scale[:, :-1], "scale"),
        (2, lambda scale: None, r"feat \[B, M, C\]"),
        (4, lambda codes: codes[:-1], "of 2 axes"),
        (5, lambda parameters: [p[1:] if i == 5 else p for i, p in enumerate(parameters)], r"parameters\[5\]"),
        (6, lambda heads: 4, "heads that divide"),
        (8, lambda eps: 0.0, "eps above 0"),
    ],
)
def test_what_does_not_fit_is_refused(place, change, match):
    arguments = list(operands(2, 3, 8, 2, 3, (4, 5), 2, torch.float32))
    arguments[place] = change(arguments[place])
    with pytest.raises((TypeError, ValueError), match=match):
        grid_cross_attention(*arguments)
