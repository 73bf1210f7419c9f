"""Latents through several layers against plain PyTorch in float64: values, gradients, and what is refused."""

import os
from pathlib import Path

import pytest
import torch
from support import check_over_draws, needs_extension, relative_error
from warm_python import python

import perceiver_fast as pf
from perceiver_fast import extension, reference
from perceiver_fast.ops import latent_layers

ATTENTION, FEED_FORWARD = True, False


def operands(shape, inner, heads, layers, dtype, seed=0, drops=False):
    """Latents, and the op's other arguments; weights such that activations stay near one. Dropout, or none."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*sizes):
        numbers = torch.randn(sizes, generator=generator, dtype=torch.float64)
        return (numbers * sizes[-1] ** -0.5 if len(sizes) == 2 else numbers).to(dtype)

    x, width, parameters = draw(*shape), shape[-1], []
    for attention in layers:
        first = ((inner, width), (2 * inner, width)) if attention else ((2 * inner, width), (2 * inner,))
        parameters += [draw(*sizes) for sizes in ((width,), (width,), *first, (width, inner), (width,))]
    count = len(layers)
    drawn = [torch.tensor([seed]) if attention else draw(*shape) for attention in layers if drops]
    return (
        x,
        parameters,
        [heads * attention for attention in layers],
        [(inner // heads) ** -0.5] * count,
        [1e-5] * count,
        [0.3] * len(drawn),
        drawn,
    )


def results(run, x, parameters, *options):
    tensors = [t.clone().requires_grad_() for t in (x, *parameters)]
    out = run(tensors[0], tensors[1:], *options)
    d_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(out.dtype)
    return [out, *torch.autograd.grad(out, tensors, d_out)]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    "shape, inner, heads",
    [
        ((2, 5, 7), 6, 2),
        ((3, 1, 8), 4, 1),  # a softmax over one latent
        ((7, 16, 32), 32, 4),  # whole vectors; a last chunk that is not full
        ((70, 3, 16), 8, 2),  # many chunks, whose gradients are summed in parts
        ((2, 33, 72), 40, 5),  # wide latents, whose activations are saved
        ((1, 130, 20), 12, 3),
        ((21, 5, 12), 8, 1),  # elements behind one another, and a chunk that is not full
        ((3, 50, 70), 24, 2),  # two elements a chunk
        ((2, 200, 16), 12, 2),  # some queries at a time
        ((1, 256, 80), 16, 1),
    ],
)
def test_values_and_gradients(shape, inner, heads, dtype, backend):
    floor = {torch.float64: 1e-13, torch.float32: 3e-7}[dtype]
    rows = []
    for seed in range(6):
        drops = seed % 2 == 1
        low = operands(shape, inner, heads, (FEED_FORWARD, ATTENTION, FEED_FORWARD), dtype, seed, drops)
        want = results(reference.latent_layers, low[0].double(), [p.double() for p in low[1]], *low[2:])
        theirs = results(reference.latent_layers, *low)
        with pf.use_backend(backend):
            got = results(latent_layers, *low)
        for i, (mine, other, exact) in enumerate(zip(got, theirs, want)):
            assert mine.dtype == dtype and mine.shape == exact.shape
            rows.append((i, relative_error(mine, exact), relative_error(other, exact)))
    check_over_draws(rows, floor)


@pytest.mark.skipif(**needs_extension)
def test_no_bit_depends_on_the_number_of_threads_or_on_gradients():
    arguments = operands((40, 16, 72), 64, 4, (ATTENTION, FEED_FORWARD), torch.float32)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(results(latent_layers, *arguments))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))
    assert torch.equal(latent_layers(*arguments), found[0][0])


@pytest.mark.skipif(**needs_extension)
def test_means_far_from_zero_keep_their_deviations():
    """1e4 beside deviations of one: a mean in one float32 number would be off by 5e-4."""
    x, parameters, *options = operands((2, 6, 64), 8, 2, (FEED_FORWARD,), torch.float32)
    x = x + 1e4
    want = reference.latent_layers(x.double(), [p.double() for p in parameters], *options) - x.double()
    mine, plain = (
        run(x, parameters, *options).double() - x.double() for run in (latent_layers, reference.latent_layers)
    )
    assert relative_error(mine, want) <= 2 * relative_error(plain, want)


@pytest.mark.skipif(**needs_extension)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_element_s_nan_stays_its_own(value):
    x, *rest = operands((6, 4, 16), 8, 2, (ATTENTION, FEED_FORWARD), torch.float32)
    clean = latent_layers(x, *rest)
    x[2, 1, 3] = value
    found = latent_layers(x, *rest)
    assert found[2].isnan().all() and torch.equal(found[[0, 1, 3, 4, 5]], clean[[0, 1, 3, 4, 5]])


@pytest.mark.skipif(**needs_extension)
def test_weights_of_one_have_no_gradient():
    """Logits of 1e19 leave one weight, whatever they round to; nothing flows back through it."""
    x, parameters, heads, _, eps, *_ = operands((2, 6, 16), 8, 2, (ATTENTION,), torch.float32)
    found = results(latent_layers, x, parameters, heads, [1e19], eps)
    to_q, to_kv = found[4], found[5]
    assert all(t.isfinite().all() for t in found)
    assert not to_q.any() and not to_kv[:8].any() and to_kv[8:].any()


@pytest.mark.skipif(**needs_extension)
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_values_and_gradients_on_every_instruction_set(isa):
    """Of this op and of grid_cross_attention, which computes with the same kernels."""
    if isa not in extension.module.available_isas():
        pytest.skip(f"this CPU has no {isa}")
    if isa == extension.module.active_isa():
        return  # what this process runs
    files = [str(Path(__file__).with_name(f"test_{name}.py")) for name in ("latent_layers", "grid_cross_attention")]
    command = [
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        *files,
        "-k",
        "values_and_gradients and auto or nan",
    ]
    done = python(*command, env=os.environ | {"PERCEIVER_FAST_CPU_ISA": isa}, cwd=str(Path(__file__).parent))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def test_second_derivatives():
    x, parameters, *options = operands((2, 3, 4), 4, 2, (ATTENTION, FEED_FORWARD), torch.float64, drops=True)
    tensors = [t.requires_grad_() for t in (x, *parameters)]
    assert torch.autograd.gradgradcheck(lambda x, *p: latent_layers(x, p, *options), tensors)


def test_the_reference_is_perceiver_pytorchs():
    from perceiver_pytorch.perceiver_pytorch import Attention, FeedForward, PreNorm

    attention, feed_forward = PreNorm(12, Attention(12, heads=2, dim_head=3)), PreNorm(12, FeedForward(12))
    x = torch.randn(2, 5, 12)
    want = attention(x) + x
    want = feed_forward(want) + want
    a, f = attention.fn, feed_forward.fn.net
    first = attention.norm.weight, attention.norm.bias, a.to_q.weight, a.to_kv.weight, a.to_out.weight, a.to_out.bias
    second = feed_forward.norm.weight, feed_forward.norm.bias, f[0].weight, f[0].bias, f[2].weight, f[2].bias
    found = reference.latent_layers(x, [*first, *second], [2, 0], [a.scale, 1.0], [1e-5, 1e-5])
    torch.testing.assert_close(found, want)


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda a: (a[0][0], *a[1:]), "latents x"),
        (lambda a: (a[0].double(), *a[1:]), "like x"),
        (lambda a: (a[0], a[1][:-1], *a[2:]), "6 parameters"),
        (lambda a: (a[0], [*a[1][:2], a[1][2][1:], *a[1][3:]], *a[2:]), r"parameters\[2\]"),
        (lambda a: (a[0], a[1], [3], *a[3:]), "heads that divide"),
        (lambda a: (*a[:4], [0.0]), "eps above 0"),
        (lambda a: (*a[:5], [0.5], []), "drawn of none or of all 1"),
        (lambda a: (*a[:5], [0.5], [a[0]]), r"drawn\[0\]"),
        (lambda a: (*a[:5], [1.0], [torch.tensor([1])]), "dropout probability"),
    ],
)
def test_what_does_not_fit_is_refused(change, match):
    with pytest.raises((TypeError, ValueError), match=match):
        latent_layers(*change(operands((2, 3, 8), 8, 2, (ATTENTION,), torch.float32)))
