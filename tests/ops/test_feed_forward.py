"""The feed-forward against plain PyTorch in float64, and what it keeps for the backward."""

import pytest
import torch
import torch.nn.functional as F
from support import check_over_draws, relative_error

import perceiver_fast as pf
from perceiver_fast.ops import feed_forward


def plain(z, weight1, bias1, weight2):
    value, gate = F.linear(z, weight1, bias1).chunk(2, -1)
    return F.linear(value * F.gelu(gate), weight2)


def operands(shape, inner, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = (shape, (2 * inner, shape[-1]), (2 * inner,), (shape[-1] + 1, inner))
    factors = (1, shape[-1] ** -0.5, 1, inner**-0.5)
    return [(torch.randn(s, generator=generator, dtype=torch.float64) * f).to(dtype) for s, f in zip(sizes, factors)]


def results(run, tensors):
    tensors = [t.clone().requires_grad_() for t in tensors]
    out = run(*tensors)
    d_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(out.dtype)
    return [out, *torch.autograd.grad(out, tensors, d_out)]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "shape, inner", [((2, 5, 7), 3), ((1, 1), 1), ((130, 17), 64), ((2, 128, 256), 512), ((0, 4), 8)]
)
def test_values_and_gradients(shape, inner, dtype, backend):
    # In float64, too, 1 + erf(x) has lost digits far below zero, which the kernel keeps.
    floor = {torch.float64: 1e-11, torch.float32: 3e-7, torch.bfloat16: 2e-3, torch.float16: 3e-4}[dtype]
    rows = []
    for seed in range(16 if max(shape) < 10 else 2):  # how few numbers round is chance
        low = operands(shape, inner, dtype, seed)
        want, theirs = results(plain, [t.double() for t in low]), results(plain, low)
        with pf.use_backend(backend):
            got = results(feed_forward, low)
        for i, (mine, other, exact) in enumerate(zip(got, theirs, want)):
            assert mine.dtype == dtype and mine.shape == exact.shape
            rows.append((i, relative_error(mine, exact), relative_error(other, exact)))
    check_over_draws(rows, floor)


def test_half_precision_with_a_float32_bias():
    z, weight1, bias1, weight2 = operands((2, 5, 8), 16, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = feed_forward(z.bfloat16(), weight1, bias1, weight2)
    assert out.dtype == torch.bfloat16 and relative_error(out, plain(z, weight1, bias1, weight2)) < 0.02


def test_parameters_are_taken_in_the_dtype_of_the_input():
    z, *parameters = operands((2, 5, 8), 16, torch.float32)
    exact = [t.double() for t in (z, *parameters)]
    got, want = results(feed_forward, [exact[0], *parameters]), results(plain, exact)
    assert [t.dtype for t in got] == [torch.float64] * 2 + [torch.float32] * 3
    for mine, theirs in zip(got, want):
        assert relative_error(mine, theirs) < 1e-6


def test_gradcheck():
    tensors = [t.requires_grad_() for t in operands((3, 4), 5, torch.float64)]
    assert torch.autograd.gradcheck(feed_forward, tensors)


def kept_numbers(run, tensors):
    """Numbers that the backward of ``run(*tensors)`` holds, without the parameters, all tensors but the first."""
    kept, weights = {}, {t.untyped_storage().data_ptr() for t in tensors[1:]}

    def pack(t):
        storage = t.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes() // t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run(*tensors)
    return sum(numbers for pointer, numbers in kept.items() if pointer not in weights)


def test_the_wide_product_is_all_that_is_kept():
    """z and h, 9 numbers a channel; plain PyTorch keeps what GEGLU and gelu make of h, too: 17."""
    tensors = [t.requires_grad_() for t in operands((64, 32), 128, torch.float32)]
    assert kept_numbers(feed_forward, tensors) == 64 * 32 * 9
    assert kept_numbers(plain, tensors) == 64 * 32 * 17


def test_only_some_gradients():
    for which in range(4):
        tensors = operands((2, 4), 6, torch.float64)
        tensors[which].requires_grad_()
        (mine,) = torch.autograd.grad(feed_forward(*tensors).sum(), tensors[which])
        (want,) = torch.autograd.grad(plain(*tensors).sum(), tensors[which])
        assert relative_error(mine, want) < 1e-12


def test_bad_input_is_explained():
    with pytest.raises(ValueError, match=r"expected weight1 \[2 F, 4\]"):
        feed_forward(torch.randn(2, 4), torch.randn(6, 5), torch.randn(6), torch.randn(4, 3))
    with pytest.raises(ValueError, match="values and gates"):
        feed_forward(torch.randn(2, 4), torch.randn(6, 4), torch.randn(6), torch.randn(4, 6))
