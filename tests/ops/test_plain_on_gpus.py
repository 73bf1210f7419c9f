"""What no kernel takes on a GPU, float64 first of all, forms no weights of queries times tokens.

The meta device stands in for a GPU: the same choices, and tensors without content.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from perceiver_fast.ops import cross_attention
from perceiver_fast.ops.grid_attention import grid_attention_unchecked
from perceiver_fast.ops.grid_query_attention import grid_query_attention_unchecked

QUERIES, SIZES, CHANNELS = 512, (64, 128), 8
TOKENS = SIZES[0] * SIZES[1]


class Largest(TorchDispatchMode):
    """Elements of the largest result of an operator."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.elements = max(self.elements, *(t.numel() for t in tree_leaves(result) if isinstance(t, torch.Tensor)), 0)
        return result


def drawn(*shape, device):
    return torch.randn(*shape, dtype=torch.float64).to(device).requires_grad_()


def empty(*shape, device):
    return torch.empty(*shape, dtype=torch.float64, device=device, requires_grad=True)


def dense(make, device, **options):
    leaves = [make(1, 1, rows, CHANNELS, device=device) for rows in (QUERIES, TOKENS, TOKENS)]
    return leaves, cross_attention(*leaves, **options)


def grid(make, device, **options):
    shapes = (1, QUERIES, CHANNELS + sum(SIZES)), (1, *SIZES, CHANNELS), (1, *SIZES)
    leaves = [make(*shape, device=device) for shape in shapes]
    return leaves, grid_attention_unchecked(*leaves, **options)[0]


def described(make, device):
    shapes = (1, 1, QUERIES, CHANNELS + sum(SIZES)), (1, *SIZES, CHANNELS), (1, 1, QUERIES, CHANNELS), (1, *SIZES)
    leaves = [make(*shape, device=device) for shape in shapes]
    return leaves, grid_query_attention_unchecked(*leaves)


CALLS = [(dense, {}), (dense, dict(inverted=True)), (dense, dict(return_lse=True)), (grid, {}), (grid, dict(inverted=True)),
         (described, {})]  # fmt: skip


@pytest.mark.parametrize("call, options", CALLS)
def test_weights_exist_in_blocks(call, options):
    with Largest() as largest:
        leaves, out = call(empty, "meta", **options)
        torch.autograd.grad([t for t in tree_leaves(out)], leaves, [torch.ones_like(t) for t in tree_leaves(out)])
    assert TOKENS * CHANNELS <= largest.elements < QUERIES * TOKENS / 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: NOT tested here")
@pytest.mark.parametrize("call, options", CALLS)
def test_float64_on_a_gpu_is_that_of_the_cpu(call, options):
    found = []
    for device in ("cuda", "cpu"):
        torch.manual_seed(0)
        leaves, out = call(drawn, device, **options)
        grads = torch.autograd.grad(tree_leaves(out)[0].square().sum(), leaves)
        found.append([t.detach().cpu() for t in (*tree_leaves(out), *grads)])
    for gpu, cpu in zip(*found):
        assert (gpu - cpu).norm() <= 1e-10 * cpu.norm()
