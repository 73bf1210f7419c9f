"""Cases of grid_attention on GPUs, and the errors of its kernels and of plain PyTorch, both against float64."""

import torch
from support import grid_inputs, relative_error

import perceiver_fast as pf
from perceiver_fast import reference
from perceiver_fast.ops.grid_attention import grid_attention_unchecked

FLOOR = {torch.float32: 5e-7, torch.bfloat16: 2e-3, torch.float16: 3e-4}
DTYPES = list(FLOOR)
# batch, queries, features, sizes, masked
CASES = [
    (1, 1, 1, (1,), False),
    (2, 5, 3, (7,), False),
    (1, 1, 1, (1, 1), True),
    (1, 70, 3, (16, 32), False),  # more than a block of queries, no holes
    (2, 13, 3, (9, 13), True),  # holes: masked, and beyond the last column
    (1, 9, 4, (21, 70), False),  # several splits, groups and blocks of columns
    (1, 8, 6, (3, 4, 5), True),
    (2, 9, 9, (4, 39), True),
    (1, 4, 40, (5, 2, 3), False),
    (2, 5, 16, (3, 35), True),  # no room for holes in the keys
    (1, 3, 3, (2, 3, 1, 2, 2), False),
]


def gradients(function, inputs, weights):
    """o, lse and, with dropout, kept, and the gradients of their sum with ``weights`` by q, feat and scale."""
    q, feat, scale = (t.clone().requires_grad_() for t in inputs)
    out = function(q, feat, scale)
    total = sum((t * w.to(t.dtype)).sum() for t, w in zip(out, weights) if t is not None)
    found = torch.autograd.grad(total, (q, feat, scale))
    return dict(zip(("o", "lse", "kept"), out)) | dict(zip(("dq", "dfeat", "dscale"), found))


def errors(device, dtype, case, magnitude=1.0, dropout=0.0, shift=0.0, backend="triton"):
    """Errors of the kernels and of plain PyTorch in ``dtype``, both against float64."""
    batch, queries, features, sizes, masked = case
    q, feat, scale, mask = grid_inputs(batch, queries, features, sizes, torch.float32, masked, magnitude)
    q[..., features : features + sizes[0]] += shift
    feat = feat.to(dtype).float()  # exact in all dtypes: what is measured is the arithmetic
    q, feat, scale = (t.to(device) for t in (q, feat, scale))
    mask = None if mask is None else mask.to(device)
    weights = [torch.randn(q.shape), torch.randn(q.shape[:2], dtype=torch.float64), torch.randn(q.shape[:2])]
    weights = [w.to(device) for w in weights[: 3 if dropout else 2]]
    visible = torch.ones(batch, dtype=torch.bool) if mask is None else mask.flatten(1).any(1)
    weights[1][~visible] = 0  # the lse of an all-masked row is a sentinel
    seed = torch.tensor([1234, 5], device=device)  # of tokens from the sixth on

    def plain(q, feat, scale):
        return reference.grid_attention(q, feat, scale, mask, dropout, seed)

    def fast(q, feat, scale):
        half = None if dtype == torch.float32 else dtype
        return grid_attention_unchecked(q, feat, scale, mask, dropout, half=half, seed=seed)

    with pf.use_backend(backend):
        kernel = gradients(fast, (q, feat, scale), weights)
    exact = gradients(plain, (q.double(), feat.double(), scale.double()), weights)
    rounded = gradients(plain, (q.to(dtype), feat.to(dtype), scale.to(dtype)), weights)
    rows = {}
    for name, value in kernel.items():
        if value is None:
            continue
        if name == "lse":
            kernel[name], exact[name], rounded[name] = (r[name][visible] for r in (kernel, exact, rounded))
        rows[name] = relative_error(kernel[name], exact[name]), relative_error(rounded[name], exact[name])
    return rows
