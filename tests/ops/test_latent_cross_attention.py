"""A small model's cross-attention to keys and values against plain PyTorch in float64: values, gradients, and what is refused."""

import pytest
import torch
from support import check_over_draws, needs_extension, relative_error

import perceiver_fast as pf
from perceiver_fast import reference
from perceiver_fast.ops import latent_cross_attention
from perceiver_fast.ops.latent_cross_attention import latent_cross_attention_unchecked, parameter_shapes

SHAPES = [  # B, N, D, M, H, d, masked
    (2, 4, 7, 9, 2, 3, False),
    (3, 1, 8, 33, 1, 4, True),
    (7, 16, 32, 16, 1, 64, False),  # as many queries as tokens
    (70, 5, 16, 12, 2, 8, True),  # many chunks, whose gradients are summed in parts
    (2, 33, 20, 300, 3, 5, False),
    (1, 64, 128, 700, 1, 16, False),
    (2, 90, 12, 5, 2, 8, True),  # fewer tokens than queries
]


def operands(batch, latents, width, tokens, heads, dim, masked, dtype, shared=False, seed=0, magnitude=1.0):
    """All arguments of the op."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        numbers = torch.randn(shape, generator=generator, dtype=torch.float64)
        return (numbers * shape[-1] ** -0.5 if len(shape) == 2 else numbers).to(dtype)

    mask = draw(batch, tokens) > -0.3 if masked else None
    if masked and batch > 1:
        mask[0] = False
    parameters = [draw(*shape) for shape in parameter_shapes(width, heads * dim)]
    keys_values = draw(batch, tokens, 2 * heads * dim)
    keys_values[..., : heads * dim] *= magnitude
    return draw(1 if shared else batch, latents, width), keys_values, mask, parameters, heads, dim**-0.5, 1e-5


def in_float64(value):
    if isinstance(value, list):
        return [in_float64(each) for each in value]
    return value.double() if torch.is_tensor(value) and value.is_floating_point() else value


def results(run, x, keys_values, mask, parameters, *options, **keywords):
    tensors = [t.clone().requires_grad_() for t in (x, keys_values, *parameters)]
    out = run(tensors[0], tensors[1], mask, tensors[2:], *options, **keywords)
    d_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(out.dtype)
    return [out, *torch.autograd.grad(out, tensors, d_out)]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    "dtype, magnitude", [(torch.float64, 1.0), (torch.float32, 1.0), (torch.float32, 30.0)], ids=str
)
@pytest.mark.parametrize("shared, adds", [(False, True), (True, True), (True, False)])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape, shared, adds, dtype, backend, magnitude):
    floor = {torch.float64: 1e-13, torch.float32: 3e-7}[dtype]
    rows = []
    for seed in range(6):
        low = operands(*shape, dtype, shared, seed, magnitude)
        want = results(reference.latent_cross_attention, *(in_float64(value) for value in low), adds=adds)
        theirs = results(reference.latent_cross_attention, *low, adds=adds)
        with pf.use_backend(backend):
            got = results(latent_cross_attention, *low, adds=adds)
        for i, (mine, other, exact) in enumerate(zip(got, theirs, want)):
            assert mine.dtype == dtype and mine.shape == exact.shape
            rows.append((i, relative_error(mine, exact), relative_error(other, exact)))
    check_over_draws(rows, floor)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_dropout_drops_what_the_reference_drops(backend):
    low, seed = operands(3, 9, 16, 40, 2, 8, True, torch.float64), torch.tensor([7])
    want = results(reference.latent_cross_attention, *low, dropout=0.3, seed=seed)
    with pf.use_backend(backend):
        got = results(latent_cross_attention_unchecked, *low, dropout=0.3, seed=seed)
    for mine, exact in zip(got, want):
        assert relative_error(mine, exact) < 1e-12
    torch.manual_seed(3)
    first = latent_cross_attention(*low, dropout=0.3)
    assert not torch.equal(first, latent_cross_attention(*low, dropout=0.3))
    torch.manual_seed(3)
    assert torch.equal(first, latent_cross_attention(*low, dropout=0.3))


@pytest.mark.skipif(**needs_extension)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("seen", [0, 1])
def test_weights_that_are_constant_give_no_gradient(seen, dtype):
    """An element that sees one token, or none and so all alike: exactly zero for all that its weights are made of."""
    x, keys_values, _, parameters, *options = operands(1, 5, 8, 9, 2, 4, False, dtype)
    mask = torch.zeros(1, 9, dtype=torch.bool)
    mask[0, :seen] = True
    _, _, d_kv, d_gain, d_shift, d_to_q, *_ = results(
        latent_cross_attention, x, keys_values, mask, parameters, *options, adds=False
    )
    assert not any(grad.any() for grad in (d_kv[..., :8], d_gain, d_shift, d_to_q)) and d_kv[..., 8:].any()


@pytest.mark.skipif(**needs_extension)
def test_no_bit_depends_on_the_number_of_threads_or_on_gradients():
    arguments = operands(40, 16, 32, 70, 2, 16, False, torch.float32)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(results(latent_cross_attention, *arguments)[0])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found[1:])
    assert torch.equal(latent_cross_attention(*arguments), found[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    low = operands(2, 6, 16, 30, 2, 8, True, dtype)
    got = results(latent_cross_attention, *low)
    with pf.use_backend("reference"):
        wide = [v.float() if torch.is_tensor(v) and v.is_floating_point() else v for v in low]
        wide[3] = [p.float() for p in low[3]]
        want = results(reference.latent_cross_attention, *wide)
    for mine, exact in zip(got, want):
        assert mine.dtype == dtype and relative_error(mine, exact) < 2 * torch.finfo(dtype).eps


def test_second_derivatives():
    x, keys_values, mask, parameters, *options = operands(2, 3, 4, 5, 2, 2, True, torch.float64)
    tensors = [t.requires_grad_() for t in (x, keys_values, *parameters)]

    def run(x, keys_values, *parameters):
        return latent_cross_attention(x, keys_values, mask, parameters, *options)

    assert torch.autograd.gradgradcheck(run, tensors)


@pytest.mark.parametrize(
    "place, change, match",
    [
        (0, lambda x: x[0], "latents x"),
        (0, lambda x: torch.cat([x, x]), "the same batch"),
        (1, lambda kv: kv.double(), "like x"),
        (1, lambda kv: kv[..., 1:], "heads that divide"),
        (1, lambda kv: kv[:, :0], "keys_values"),
        (2, lambda mask: mask[:, 1:], "mask"),
        (2, lambda mask: mask.float(), "bool mask"),
        (3, lambda parameters: parameters[:-1], "5 parameters"),
        (3, lambda parameters: [p[1:] if i == 2 else p for i, p in enumerate(parameters)], r"parameters\[2\]"),
        (4, lambda heads: 4, "heads that divide"),
        (6, lambda eps: 0.0, "eps above 0"),
    ],
)
def test_what_does_not_fit_is_refused(place, change, match):
    arguments = list(operands(2, 3, 8, 9, 2, 3, True, torch.float32))
    arguments[place] = change(arguments[place])
    with pytest.raises((TypeError, ValueError), match=match):
        latent_cross_attention(*arguments)
    with pytest.raises(ValueError, match="dropout"):
        latent_cross_attention(*operands(2, 3, 8, 9, 2, 3, True, torch.float32), dropout=1.0)
