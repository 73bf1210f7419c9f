"""The libraries that a large matrix product on the CPU can run on.

Nobody's product is the fastest everywhere: the BLAS that torch was built with and oneDNN change ranks with the
processor's vendor, the kind of product and the number of threads. linear_probe.py times them, linear_verdict.py
decides, linear_choice.py keeps what was decided. Every library computes what it is asked for: float32 products are
float32 products, in the precision that torch.set_float32_matmul_precision (by default the highest) allows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

NAMES = ("auto", "torch", "onednn")
KINDS = ("forward", "grad_input", "grad_weight")


def onednn_product(a: Tensor, b: Tensor) -> Tensor:
    """``a [n, k] @ b [m, k]^T`` by oneDNN, any strides."""
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], None)


def _onednn_takes_bfloat16() -> bool:
    """Whether this CPU has what oneDNN's bfloat16 products need, AVX-512 or the like; elsewhere they raise."""
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return torch.backends.mkldnn.is_available() and supported is not None and supported()


@dataclass(frozen=True)
class Library:
    """One library's products of contiguous ``x [n, k]``, ``weight [m, k]`` and ``d_out [n, m]``.

    ``takes`` are its dtypes.
    """

    forward: Callable[[Tensor, Tensor], Tensor] | None = None
    grad_input: Callable[[Tensor, Tensor], Tensor] | None = None
    grad_weight: Callable[[Tensor, Tensor], Tensor] | None = None
    takes: tuple[torch.dtype, ...] = (torch.float32,)

    def products(self) -> dict[str, Callable[[Tensor, Tensor], Tensor] | None]:
        """The products of a training step by their kind."""
        return dict(forward=self.forward, grad_input=self.grad_input, grad_weight=self.grad_weight)


LIBRARIES = {
    "torch": Library(
        forward=lambda x, weight: torch.nn.functional.linear(x, weight),
        grad_input=lambda d_out, weight: d_out @ weight,
        grad_weight=lambda d_out, x: d_out.T @ x,
        takes=(torch.float64, torch.float32, torch.bfloat16, torch.float16),
    ),
    "onednn": Library(
        forward=onednn_product,
        grad_input=lambda d_out, weight: onednn_product(d_out, weight.T),
        grad_weight=lambda d_out, x: onednn_product(d_out.T, x.T),
        takes=(torch.float32, torch.bfloat16) if _onednn_takes_bfloat16() else (torch.float32,),
    ),
}


def reasons(name: str) -> list[str]:
    """Why a library cannot be used with this torch; empty where it can."""
    if name == "onednn":
        if not torch.backends.mkldnn.is_available():
            return ["torch was built without oneDNN"]
        if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
            return ["this torch does not offer oneDNN's linear"]
    return []
