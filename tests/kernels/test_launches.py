"""What surrounds the kernels: nothing asks the host, and on a GPU streams, graphs, devices and compiling work."""

import pytest
import torch
from support import NoSync, grid_inputs

from perceiver_fast.kernels.launch import Launch
from perceiver_fast.ops import add_layer_norm, cross_attention, geglu
from perceiver_fast.ops.grid_attention import grid_attention_unchecked
from perceiver_fast.ops.grid_query_attention import grid_query_attention_unchecked

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: NOT tested here")


def attend(device, dropout=0.2):
    """All ops, forward and backward, with masks and gradients of everything; gives a function and its leaves."""
    q, feat, scale, mask = (t.to(device) for t in grid_inputs(2, 5, 3, (4, 33), torch.float32, masked=True))
    dense = [torch.randn(2, 2, n, 24, device=device) for n in (5, 40, 40)]
    seen = torch.rand(2, 40, device=device) > 0.3
    vectors = [torch.randn(24, device=device) for _ in range(4)]
    described = [torch.randn(shape, device=device) for shape in ((2, 2, 40, 40), (2, 4, 33, 3), (2, 2, 40, 6))]
    leaves = [t.requires_grad_() for t in (q, feat, scale, *dense, *vectors, *described)]

    def run(*leaves):
        o, lse, _ = grid_attention_unchecked(*leaves[:3], mask, dropout)
        p, sums = cross_attention(*leaves[3:6], seen, dropout, return_lse=True)
        turned, _, weights = grid_attention_unchecked(*leaves[:3], mask, dropout, inverted=True)
        o = o + turned * weights.unsqueeze(-1)
        p = p + cross_attention(*leaves[3:6], seen, dropout, inverted=True)
        y, z = add_layer_norm(leaves[3], p, *leaves[6:9])
        p = y + geglu(z, leaves[9]).repeat(1, 1, 1, 2)
        decoded = grid_query_attention_unchecked(*leaves[10:], leaves[2], mask=seen, dropout=dropout)
        p = p + decoded.square().mean()
        total = o.square().sum() + lse.clamp_min(-1e3).sum() + p.square().sum() + sums.clamp_min(-1e3).sum()
        return torch.autograd.grad(total, leaves)

    return run, leaves


def test_nothing_waits_for_the_device(device, monkeypatch):
    """The operations around the kernels, which are left out here: the interpreter reads tensors on the host."""
    monkeypatch.setattr(Launch, "run", lambda self: None)
    run, leaves = attend(device)
    with NoSync():
        run(*leaves)


@needs_gpu
def test_graphs(device):
    """Captured and replayed on other values, forward and backward."""
    run, leaves = attend(device, dropout=0.0)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run(*leaves)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(*leaves)
    with torch.no_grad():
        for leaf in leaves:
            leaf.mul_(0.5)
    graph.replay()
    torch.cuda.synchronize()
    for mine, theirs in zip(captured, run(*leaves)):
        assert torch.equal(mine, theirs)


@needs_gpu
def test_streams(device):
    run, leaves = attend(device, dropout=0.0)
    here = run(*leaves)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        there = run(*leaves)
    torch.cuda.current_stream().wait_stream(stream)
    for mine, theirs in zip(here, there):
        assert torch.equal(mine, theirs)


@needs_gpu
def test_other_devices():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs: NOT tested here")
    for mine in attend(torch.device("cuda", 1), dropout=0.0)[0](*attend(torch.device("cuda", 1))[1]):
        assert mine.device.index == 1 and mine.isfinite().all()


@needs_gpu
def test_inductor(device):
    """torch.compile with its own compiler, without a graph break: the ops are opaque to it."""
    q, feat, scale, _ = (t if t is None else t.to(device) for t in grid_inputs(2, 5, 3, (4, 33), torch.float32))

    def loss(q):
        return grid_attention_unchecked(q, feat, scale)[0].square().sum()

    found = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        leaf = q.clone().requires_grad_()
        found.append(torch.autograd.grad(function(leaf), leaf)[0])
    assert torch.allclose(*found, rtol=1e-5, atol=1e-6)
