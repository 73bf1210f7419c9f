"""What streaming attention is called with: strides, dtypes and sizes, what it refuses, and what runs it on a GPU."""

import importlib.util

import pytest
import torch
from support import needs_extension

import perceiver_fast as pf
from perceiver_fast.ops.cross_attention import CROSS_ATTENTION, CrossAttentionCall, cross_attention

pytestmark = pytest.mark.skipif(**needs_extension)


def test_strides_and_shared_queries():
    kv = torch.randn(2, 70, 2, 3, 8)
    k, v = kv.permute(2, 0, 3, 1, 4)
    q = torch.randn(1, 20, 3, 8).transpose(1, 2).expand(2, -1, -1, -1)
    expected = cross_attention(*(t.contiguous() for t in (q, k, v)))
    assert torch.equal(cross_attention(q, k, v), expected)
    flipped = torch.randn(2, 3, 8, 70).transpose(2, 3)  # channels are not dense
    assert torch.equal(cross_attention(q, k, flipped), cross_attention(q, k, flipped.contiguous()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_may_be_written_to(dtype):
    """They are no views, and lie in memory as a layer that joins the heads reads them."""
    q, k, v = (torch.randn(2, 3, n, 8, dtype=dtype) for n in (20, 70, 70))
    scale = torch.ones(1, dtype=dtype, requires_grad=True)
    for learn in (False, True):
        q.requires_grad_(learn)
        out = cross_attention(q, k, v)
        assert out.transpose(1, 2).is_contiguous() and not out._is_view()
        torch.relu_(out).mul_(scale)
        out.transpose(1, 2)[..., 0] = 0
        out.detach_()
    cross_attention(q, k, v).sum().backward()
    assert not q.grad._is_view()


def test_empty_batch_and_no_queries():
    k = torch.randn(2, 1, 5, 4)
    assert cross_attention(torch.randn(2, 1, 0, 4), k, k).shape == (2, 1, 0, 4)
    assert cross_attention(torch.randn(0, 1, 3, 4), k[:0], k[:0]).shape == (0, 1, 3, 4)
    q = torch.randn(0, 1, 3, 4, requires_grad=True)
    cross_attention(q, k[:0], k[:0]).sum().backward()
    assert q.grad.shape == q.shape


def test_float16_is_computed_in_float32():
    q, k, v = (torch.randn(1, 2, n, 8).half() for n in (6, 50, 50))
    out = cross_attention(q, k, v)
    assert out.dtype == torch.float16 and torch.equal(out, cross_attention(q.float(), k.float(), v.float()).half())


BAD = [
    (lambda q, k, v: dict(q=q[0]), ValueError, r"expected q \[B, H, rows, channels\]"),
    (lambda q, k, v: dict(k=k.long()), TypeError, "floating point"),
    (lambda q, k, v: dict(k=k.double()), TypeError, "torch.float32 like q"),
    (lambda q, k, v: dict(k=k[..., :3]), ValueError, "channels"),
    (lambda q, k, v: dict(v=v[:, :, :4]), ValueError, "same number of tokens"),
    (lambda q, k, v: dict(k=k[:, :, :0], v=v[:, :, :0]), ValueError, "at least one"),
    (lambda q, k, v: dict(k=k[:1]), ValueError, "batch size and heads"),
    (lambda q, k, v: dict(mask=torch.ones(2, 9)), TypeError, "bool mask"),
    (lambda q, k, v: dict(mask=torch.ones(2, 8, dtype=torch.bool)), ValueError, r"mask of shape \(2, 9\)"),
    (lambda q, k, v: dict(dropout=1.0), ValueError, r"\[0, 1\)"),
    (lambda q, k, v: dict(inverted=True, return_lse=True), ValueError, "no log-sum-exp"),
    (lambda q, k, v: dict(v=v.to("meta")), ValueError, "on cpu like q"),
]


@pytest.mark.parametrize("change, error, words", BAD, ids=lambda x: x if isinstance(x, str) else "")
def test_bad_input_is_explained(change, error, words):
    q, k, v = torch.randn(2, 1, 5, 4), torch.randn(2, 1, 9, 4), torch.randn(2, 1, 9, 4)
    with pytest.raises(error, match=words):
        cross_attention(**dict(q=q, k=k, v=v) | change(q, k, v))


def test_the_registered_op_refuses_what_it_cannot_read():
    q, k = torch.randn(2, 1, 5, 4), torch.randn(2, 1, 9, 4)
    forward = torch.ops.perceiver_fast.cross_attention_forward
    plain = (None, 1.0, 0.0, None, False)
    for bad in (
        (q.half(), k.half(), k.half(), *plain),
        (q, k[:1], k, *plain),
        (q, k, k[:, :, :3], *plain),
        (q, k, k, torch.ones(2, 8, dtype=torch.bool), *plain[1:]),
        (q, k, k, None, 1.0, 0.5, None, False),
    ):
        with pytest.raises(RuntimeError, match="expected"):
            forward(*bad)


# dtype, what else the call is, the backend on a GPU (of 132 multiprocessors) and a word of torch's attention's reason
ON_GPUS = [
    ("bfloat16", dict(batch=1, heads=1, queries=512, dim=64, value_dim=64), "sdpa", ""),
    (
        "bfloat16",
        dict(batch=1, heads=1, queries=512, dim=64, value_dim=64, masked=True),
        "triton",
        "8 blocks of queries",
    ),
    ("bfloat16", dict(batch=16, heads=1, queries=512, dim=64, value_dim=64, masked=True), "sdpa", ""),
    ("bfloat16", dict(batch=64, heads=1, queries=512, dim=261, value_dim=261), "triton", "261 channels"),
    ("bfloat16", dict(batch=64, heads=1, queries=512, dim=512, value_dim=512), "sdpa", ""),
    ("bfloat16", dict(batch=1, heads=1, queries=512, dim=64, value_dim=64, lse=True), "triton", "log-sum-exp"),
    ("float32", dict(batch=1, heads=1, queries=512, dim=64, value_dim=64), "triton", "8 blocks of queries"),
    ("float32", dict(batch=1, heads=1, queries=50176, dim=64, value_dim=64), "sdpa", ""),
    ("float32", dict(batch=64, heads=1, queries=512, dim=322, value_dim=322), "triton", "322 channels"),
    ("float32", {}, "sdpa", ""),
    ("float64", dict(batch=1, heads=1, queries=512, dim=64, value_dim=64), "sdpa", ""),
    ("float64", dict(batch=1, heads=1, queries=512, dim=64, value_dim=64, lse=True), "reference", "log-sum-exp"),
    ("bfloat16", dict(batch=1, heads=1, queries=512, dim=64, value_dim=64, inverted=True), "triton", "latents"),
]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the multiprocessors are those of the GPU")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("dtype, call, backend, word", ON_GPUS, ids=str)
def test_what_runs_on_gpus(dtype, call, backend, word):
    choice = CROSS_ATTENTION.choose(CrossAttentionCall(getattr(torch, dtype), torch.device("cuda"), **call))
    assert choice.backend == backend, choice
    assert word in "; ".join(choice.rejected.get("sdpa", [""]))


def test_triton_says_why_it_cannot_run():
    q = torch.randn(1, 1, 5, 4)
    with pf.use_backend("triton"), pytest.raises(pf.backends.BackendError, match="triton.*cuda tensors, not cpu"):
        cross_attention(q, q, q)
