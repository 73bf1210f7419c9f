"""LayerNorm of a residual stream, with the branch that joins it, in one pass.

    y = x + branch + branch_bias        z = (y - mean(y)) / sqrt(var(y) + eps) * weight + bias

A transformer's sublayer ends in an addition to the stream and the next one begins with a LayerNorm of it: here they are
one op, and the bias of the projection before it is added on the way. Statistics are computed in float32, or float64 for
float64, whatever the dtype of the stream.
"""

from __future__ import annotations

import torch
from torch import Tensor

from perceiver_fast import reference
from perceiver_fast.ops.checks import check_device, check_dtype, check_floating
from perceiver_fast.ops.declaration import Operator, declare
from perceiver_fast.ops.derivatives import differentiable, differentiated_again, transformed
from perceiver_fast.ops.library import compute_dtype, learns
from perceiver_fast.ops.pointwise import POINTWISE_BACKENDS, PointwiseCall, runs_kernel
from perceiver_fast.ops.work import no_work
from perceiver_fast.ranges import op_range

OP = "layer_norm"


def _forward_outputs(x, branch, branch_bias, weight, bias, eps, out_dtype):
    y = x.new_empty((0,) if branch is None else x.shape)
    z = x.new_empty(x.shape, dtype=out_dtype)
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=compute_dtype(x.dtype)) for _ in range(2))
    return y, z, mean, rstd


def _backward_outputs(d_y, d_z, y, mean, rstd, weight, branch_bias):
    d_branch = d_z.new_empty((0,) if d_z.dtype == y.dtype else d_z.shape)
    d_weight, d_bias = (weight.new_empty(weight.shape) for _ in range(2))
    return y.new_empty(y.shape), d_branch, d_weight, d_bias, weight.new_empty(weight.shape if branch_bias else (0,))


def _sample(make, dtype=torch.float32, out_dtype=torch.float32, rows=(2, 3), width=17, branch=True, branch_bias=True):
    x, weight, bias = make(*rows, width, dtype=dtype), make(width, dtype=dtype), make(width, dtype=dtype)
    joins = (
        make(*rows, width, dtype=out_dtype) if branch else None,
        make(width, dtype=dtype) if branch and branch_bias else None,
    )
    return AddLayerNormFunction.apply(x, *joins, weight, bias, 1e-5, out_dtype)


def _trial(make, dtype):
    x, branch = make(3, 40, 72, dtype=dtype), make(3, 40, 72, dtype=dtype)
    return add_layer_norm(x, branch, *(make(72, dtype=dtype) for _ in range(3)))


_MANY = (64, 256)  # rows

LAYER_NORM = declare(
    OP,
    backends=POINTWISE_BACKENDS,
    call=PointwiseCall,
    operators=(
        Operator(
            "layer_norm_forward(Tensor x, Tensor? branch, Tensor? branch_bias, Tensor weight, Tensor bias, float eps, "
            "ScalarType out_dtype) -> (Tensor y, Tensor z, Tensor mean, Tensor rstd)",
            _forward_outputs,
            work=no_work,
            triton="layer_norm.forward",
        ),
        Operator(
            "layer_norm_backward(Tensor? d_y, Tensor d_z, Tensor y, Tensor mean, Tensor rstd, Tensor weight, "
            "bool branch_bias) -> (Tensor d_x, Tensor d_branch, Tensor d_weight, Tensor d_bias, Tensor d_branch_bias)",
            _backward_outputs,
            work=no_work,
            triton="layer_norm.backward",
        ),
    ),
    sample=_sample,
    trial=_trial,
    variants=(
        {},
        dict(branch=False),
        dict(branch_bias=False),
        dict(dtype=torch.float64, out_dtype=torch.float64),
        dict(out_dtype=torch.bfloat16),
    ),
    instances={
        "bfloat16, 512 wide": dict(dtype=torch.bfloat16, out_dtype=torch.bfloat16, rows=_MANY, width=512),
        "float32 and bfloat16, 1024 wide": dict(out_dtype=torch.bfloat16, rows=_MANY, width=1024),
        "float16, 2560 wide": dict(dtype=torch.float16, out_dtype=torch.float16, rows=_MANY, width=2560, branch=False),
        "float32, 8192 wide": dict(rows=_MANY, width=8192),
    },
    kernels="(layer_norm_.*|column_sums)_kernel",
)


class AddLayerNormFunction(torch.autograd.Function):
    """Connects the registered forward and backward; saves y and the statistics.

    The gradient of a branch is that of the stream, in the branch's dtype.
    """

    @staticmethod
    def forward(ctx, x, branch, branch_bias, weight, bias, eps, out_dtype):
        y, z, mean, rstd = torch.ops.perceiver_fast.layer_norm_forward(
            x, branch, branch_bias, weight, bias, eps, out_dtype
        )
        ctx.has = branch is not None, branch_bias is not None
        ctx.save_for_backward(x if branch is None else y, mean, rstd, weight)
        ctx.set_materialize_grads(False)
        ctx.options = out_dtype, eps
        return (None, z) if branch is None else (y, z)

    @staticmethod
    @op_range(OP + ".backward")
    def backward(ctx, d_y, d_z):
        y, mean, rstd, weight = ctx.saved_tensors
        branch, branch_bias = ctx.has
        out_dtype, eps = ctx.options

        def kernel(d_y, d_z):
            if d_z is None:
                d_z = torch.zeros_like(y, dtype=out_dtype)
            return torch.ops.perceiver_fast.layer_norm_backward(d_y, d_z, y, mean, rstd, weight, branch_bias)

        if differentiated_again():
            # The bias has no say in any gradient. All that joins the stream has the stream's gradient, d_x.
            def form(y, weight, bias):
                return reference.add_layer_norm(y, None, None, weight, bias, eps, out_dtype, smooth=True)[1]

            def gradients():
                d_x, _, d_weight, d_bias, _ = kernel(None, d_z)
                return d_x, d_weight, d_bias

            d_x = d_weight = d_bias = None
            if d_z is not None:
                inputs = y, weight, torch.zeros_like(weight)
                d_x, d_weight, d_bias = differentiable(gradients, form, inputs, (d_z,), (True, True, True))
            if d_x is None or d_y is None:
                d_x = d_y if d_x is None else d_x
            else:
                d_x = d_x + d_y
            d_branch = d_branch_bias = None
            if d_x is not None:
                d_branch, d_branch_bias = d_x.to(out_dtype), d_x.flatten(0, -2).sum(0)
        else:
            d_x, d_branch, d_weight, d_bias, d_branch_bias = kernel(d_y, d_z)
            if out_dtype == y.dtype:
                d_branch = d_x
        return d_x, d_branch if branch else None, d_branch_bias if branch_bias else None, d_weight, d_bias, None, None


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, out_dtype: torch.dtype | None = None
) -> Tensor:
    """LayerNorm over the last dimension.

    Args:
        x: ``[.., D]``, floating point.
        weight, bias: ``[D]``, the dtype of x.
        eps: added to the variance. Default: 1e-5, torch's.
        out_dtype: dtype of the result. Default: that of x.

    Returns:
        ``[.., D]``. Differentiable any number of times in x, weight and bias.

    Raises:
        TypeError, ValueError: wrong dtype, size or device; the message says expected, got and what to do.
        perceiver_fast.backends.BackendError: a forced backend cannot run the call.

    Example:
        >>> import torch
        >>> from perceiver_fast.ops import layer_norm
        >>> layer_norm(torch.randn(2, 5, 8), torch.ones(8), torch.zeros(8)).shape
        torch.Size([2, 5, 8])
    """
    return add_layer_norm(x, None, None, weight, bias, eps, out_dtype)[1]


def add_layer_norm(
    x: Tensor,
    branch: Tensor | None,
    branch_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """``y = x + branch + branch_bias`` and ``z = LayerNorm(y)``, in one pass.

    Under torch.compile it is plain PyTorch, which the compiler fuses with what is around it.

    Args:
        x: the stream ``[.., D]``, floating point.
        branch: what joins it, ``[.., D]`` like x, the dtype of x or out_dtype; or None.
        branch_bias: ``[D]``, the dtype of x, or None. Needs a branch.
        weight, bias: LayerNorm's, ``[D]``, the dtype of x.
        eps: added to the variance. Default: 1e-5, torch's.
        out_dtype: dtype of z, and of the branch. Default: that of x.

    Returns:
        y in the dtype of x (x itself without a branch) and z in out_dtype, both ``[.., D]``. Differentiable any number
        of times in all tensors.

    Raises:
        TypeError, ValueError: wrong dtype, size or device; the message says expected, got and what to do.
        perceiver_fast.backends.BackendError: a forced backend cannot run the call.

    Example:
        >>> import torch
        >>> from perceiver_fast.ops import add_layer_norm
        >>> x, branch = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
        >>> y, z = add_layer_norm(x, branch, torch.zeros(8), torch.ones(8), torch.zeros(8))
        >>> torch.equal(y, x + branch), z.shape
        (True, torch.Size([2, 5, 8]))
    """
    out_dtype = x.dtype if out_dtype is None else out_dtype
    _check(x, branch, branch_bias, weight, bias, out_dtype)
    return add_layer_norm_unchecked(x, branch, branch_bias, weight, bias, eps, out_dtype)


@op_range(OP)
def add_layer_norm_unchecked(
    x: Tensor,
    branch: Tensor | None,
    branch_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """:func:`add_layer_norm` for callers whose tensors fit each other; they are not checked."""
    narrow = out_dtype if compute_dtype(x.dtype) == x.dtype else x.dtype
    if not runs_kernel(LAYER_NORM, narrow, x.device):
        return reference.add_layer_norm(x, branch, branch_bias, weight, bias, eps, out_dtype, smooth=transformed())
    if learns(x, branch, branch_bias, weight, bias):
        y, z = AddLayerNormFunction.apply(x, branch, branch_bias, weight, bias, eps, out_dtype)
    else:
        y, z, *_ = torch.ops.perceiver_fast.layer_norm_forward(x, branch, branch_bias, weight, bias, eps, out_dtype)
    return x if branch is None else y, z


def _check(x, branch, branch_bias, weight, bias, out_dtype) -> None:
    check_floating(OP, x=x)
    if not (out_dtype == x.dtype or (x.dtype == torch.float32 and out_dtype in (torch.bfloat16, torch.float16))):
        raise TypeError(
            f"{OP}: expected out_dtype {x.dtype}, or half precision for a float32 x, got {out_dtype}; "
            "convert z afterwards"
        )
    if branch is None and branch_bias is not None:
        raise ValueError(f"{OP}: expected branch_bias with a branch, got it alone; give the branch, or neither")
    if branch is not None:
        if branch.shape != x.shape:
            raise ValueError(
                f"{OP}: expected branch {tuple(x.shape)}, like x, got {tuple(branch.shape)}; expand the smaller one"
            )
        check_device(OP, "branch", branch, x, "x")
        check_dtype(OP, "branch", branch, (out_dtype,), "like out_dtype (or name its dtype as out_dtype)")
    for name, vector in (("branch_bias", branch_bias), ("weight", weight), ("bias", bias)):
        if vector is None:
            continue
        if vector.shape != x.shape[-1:]:
            raise ValueError(
                f"{OP}: expected {name} [{x.shape[-1]}], got {tuple(vector.shape)}; "
                "it belongs to the last dimension of x"
            )
        check_device(OP, name, vector, x, "x")
        check_dtype(OP, name, vector, (x.dtype,), "like x")
