"""torch's FlopCounterMode counts our attention and products as it counts its own."""

import pytest
import torch
from support import grid_inputs, needs_extension
from torch.utils.flop_counter import FlopCounterMode
from warm_python import python

from perceiver_fast.ops import cross_attention, feed_forward
from perceiver_fast.ops.declaration import OPS
from perceiver_fast.ops.grid_attention import grid_attention_unchecked
from perceiver_fast.ops.work import Work


def counted(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.skipif(**needs_extension)
def test_attention_counts_as_torchs():
    q, k, v = (torch.randn(2, 3, n, 8, requires_grad=True) for n in (5, 9, 9))
    forward = 2 * 2 * 3 * 5 * 9 * (8 + 8)
    assert counted(lambda: cross_attention(q, k, v)) == forward
    assert counted(lambda: cross_attention(q, k, v).sum().backward()) == forward + 2 * 2 * 3 * 5 * 9 * 5 * 8
    q, feat, scale, _ = grid_inputs(2, 4, 3, (5, 6))
    assert counted(lambda: grid_attention_unchecked(q, feat, scale)) == 2 * 2 * 4 * 30 * (3 + 2 + 3)
    q.requires_grad_()
    both = 2 * 2 * 4 * 30 * (3 + 2 + 3 + 2 * (3 + 2) + 3)
    assert counted(lambda: grid_attention_unchecked(q, feat, scale)[0].sum().backward()) == both


@pytest.mark.skipif(**needs_extension)
def test_declared_work_is_what_shapes_say():
    """Of the samples: 2 x 7 tokens of 3 raw and 14 position channels to 8; 6 rows of 17 gates; by hand."""
    forward, backward = (op.count(args) for op, args in OPS["fourier_projection"].recorded_calls("cpu"))
    assert (
        forward == Work(2 * 7 * (3 + 2 * 7) * 8, 2 * (2 * 7) * 2 * 3)
        and backward.multiply_adds == 2 * forward.multiply_adds
    )
    forward, _ = (op.count(args) for op, args in OPS["geglu"].recorded_calls("cpu"))
    assert forward == Work(0, 6 * 17)
    forward, _ = (op.count(args) for op, args in OPS["grid_attention"].recorded_calls("cpu", inverted=True))
    assert forward == Work(2 * 4 * 30 * (2 * (3 + 2) + 3), 2 * 2 * 4 * 30)


@pytest.mark.skipif(**needs_extension)
def test_keywords_are_counted():
    with FlopCounterMode(display=False) as counter:
        torch.ops.perceiver_fast.geglu_forward(h=torch.randn(2, 4), bias=None)
    assert counter.get_total_flops() == 0


@pytest.mark.skipif(**needs_extension)
def test_feed_forward_counts_its_products():
    z, w1, w2 = torch.randn(7, 8, requires_grad=True), torch.randn(64, 8, requires_grad=True), torch.randn(8, 32)
    products = 2 * 7 * (8 * 64 + 32 * 8)
    assert counted(lambda: feed_forward(z, w1, torch.zeros(64), w2)) == products
    assert counted(lambda: feed_forward(z, w1, torch.zeros(64), w2).sum().backward()) == 2 * products + 2 * 7 * 8 * 64


def test_the_counter_is_not_imported_before_it_is_asked_for():
    code = (
        "import sys, perceiver_fast; assert 'torch.utils.flop_counter' not in sys.modules; import torch\n"
        "from torch.utils.flop_counter import flop_registry\n"
        "assert torch.ops.perceiver_fast.geglu_forward in flop_registry\n"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    code = "import torch.utils.flop_counter, perceiver_fast; " + code
    code = code.replace("assert 'torch.utils.flop_counter' not in sys.modules; ", "")
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
