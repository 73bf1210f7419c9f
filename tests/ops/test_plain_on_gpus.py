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

QUERIES, SIZES, CHANNELS = 512, (64, 1024), 8
TOKENS = SIZES[0] * SIZES[1]


class Largest(TorchDispatchMode):
    """Elements of the largest result of an operator."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.elements = max(self.elements, *(t.numel() for t in tree_leaves(result) if isinstance(t, torch.Tensor)), 0)
        return result


def empty(*shape):
    return torch.empty(*shape, dtype=torch.float64, device="meta", requires_grad=True)


def dense(**options):
    leaves = [empty(1, 1, rows, CHANNELS) for rows in (QUERIES, TOKENS, TOKENS)]
    return leaves, cross_attention(*leaves, **options)


def grid(**options):
    leaves = [empty(1, QUERIES, CHANNELS + sum(SIZES)), empty(1, *SIZES, CHANNELS), empty(1, *SIZES)]
    return leaves, grid_attention_unchecked(*leaves, **options)[0]


def described():
    leaves = [
        empty(1, 1, QUERIES, CHANNELS + sum(SIZES)),
        empty(1, *SIZES, CHANNELS),
        empty(1, 1, QUERIES, CHANNELS),
        empty(1, *SIZES),
    ]
    return leaves, grid_query_attention_unchecked(*leaves)


@pytest.mark.parametrize(
    "call, options",
    [(dense, {}), (dense, dict(inverted=True)), (dense, dict(return_lse=True)), (grid, {}), (grid, dict(inverted=True)),
     (described, {})],
)  # fmt: skip
def test_weights_exist_in_blocks(call, options):
    with Largest() as largest:
        leaves, out = call(**options)
        torch.autograd.grad([t for t in tree_leaves(out)], leaves, [torch.ones_like(t) for t in tree_leaves(out)])
    assert TOKENS * CHANNELS <= largest.elements < QUERIES * TOKENS / 8
