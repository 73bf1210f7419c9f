"""Tokens that exist as a tensor."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perceiver_fast.backends import Choice
from perceiver_fast.ops.checks import check_memory
from perceiver_fast.ops.derivatives import transformed
from perceiver_fast.ops.fourier_projection import FOURIER_PROJECTION
from perceiver_fast.ops.layer_norm import LAYER_NORM, layer_norm
from perceiver_fast.ops.layer_norm_linear import LAYER_NORM_LINEAR, is_for, is_small, layer_norm_linear_unchecked
from perceiver_fast.ops.library import autocast_dtype, unless_autocast
from perceiver_fast.ops.pointwise import PointwiseCall, runs_kernel
from perceiver_fast.ops.projected_attention import Projection
from perceiver_fast.tokens.base import Basis, Tokens, absorb_norm


class DenseTokens(Tokens):
    """Tokens that exist as a tensor: input that comes with its own encoding, or latents.

    Args:
        context: ``[B, M, C]``.
    """

    kind = "dense tokens"

    def __init__(self, context: Tensor):
        self.feat, self.dtype = context, context.dtype
        self._normalized: dict[tuple[float, torch.dtype], Tensor] = {}
        self._by_kernel: torch.dtype | None = None  # what the last call of layer_norm wrote; None: torch's

    @property
    def channels(self) -> int:
        return self.feat.shape[2]

    @property
    def half_product(self) -> bool:
        return True

    def materialize(self) -> Tensor:
        return self.feat

    def sources(self) -> tuple[Tensor, ...]:
        return (self.feat,)

    def normalized(self, eps: float, dtype: torch.dtype | None = None) -> Tensor:
        """The tokens ``[B, M, C]`` with mean 0 and variance 1: LayerNorm without its affine part, which each layer has.

        In their own dtype, or rounded to ``dtype`` as they are written, where a kernel does that.

        Computed once for all layers of one eps; anew for each where a gradient flows through it, since a checkpointed
        layer computes its own again, and after :meth:`tensor` was called, as its result may be changed in place.
        """
        dtype = self.feat.dtype if dtype is None or not self._rounds_to(dtype) else dtype
        normalized = None if self._tensor is not None else self._normalized.get((eps, dtype))
        if normalized is not None and normalized.is_inference() and not torch.is_inference_mode_enabled():
            normalized = None  # it cannot be saved for a backward
        if normalized is None or (torch.is_grad_enabled() and self.learns()):
            normalized = self._normalize(eps, dtype)
            if not normalized.requires_grad:
                self._normalized[eps, dtype] = normalized
        return normalized

    def _rounds_to(self, dtype: torch.dtype) -> bool:
        """Whether LayerNorm's kernel writes float32 tokens in ``dtype``."""
        if self.device.type != "cpu" or self.feat.dtype != torch.float32 or dtype != torch.bfloat16:
            return False
        return runs_kernel(LAYER_NORM, dtype, self.device)

    def _normalize(self, eps: float, dtype: torch.dtype) -> Tensor:
        """:meth:`normalized`, computed now."""
        context = self.feat
        learns = torch.is_grad_enabled() and self.learns()
        plain = torch.compiler.is_compiling() or (dtype == context.dtype and not learns)
        self._by_kernel = None if plain else dtype
        if plain:
            return F.layer_norm(context, context.shape[-1:], eps=eps)
        one = context.new_ones(context.shape[-1])
        return layer_norm(context, one, torch.zeros_like(one), eps, dtype)  # F.layer_norm's third derivative is wrong

    def normalized_by(self) -> Choice:
        """What computed :meth:`normalized` last."""
        if self._by_kernel is None:
            return Choice(LAYER_NORM.name, "torch")
        return LAYER_NORM.choose(PointwiseCall(self._by_kernel, self.device))

    @property
    def absorbed_channels(self) -> int:
        return self.channels

    def basis(self, projection: nn.Linear, norm: nn.LayerNorm) -> Basis:
        with unless_autocast(self.device):
            weight, bias = absorb_norm(projection, norm, self.compute)
            return Basis(weight, bias, self.normalized(norm.eps), None, False)

    def part(self, piece: slice) -> DenseTokens:
        return DenseTokens(self.feat[:, piece])

    def uses(self, path: str, width: int) -> tuple[Choice, ...]:
        if path != "projected" or not self._fuses():
            return ()
        if self._by_rows(width):
            if is_small(self.batch * self.count, self.channels, width):
                return (LAYER_NORM_LINEAR.choose(PointwiseCall(self.feat.dtype, self.device)),)
            return LAYER_NORM.choose(PointwiseCall(self.feat.dtype, self.device)), Choice("linear", "a library")
        return (self._projection(),)

    def _projection(self) -> Choice:
        """The backend that would run LayerNorm and projection as one op."""
        return FOURIER_PROJECTION.choose(PointwiseCall(self.feat.dtype, self.device))

    def _fuses(self) -> bool:
        """Whether LayerNorm and projection run as one op: the normalised tokens are not kept."""
        exact = self.feat.dtype == self.compute and autocast_dtype(self.device) is None
        return exact and self._projection().backend == "cpu"

    def _by_rows(self, width: int) -> bool:
        """Whether that op is layer_norm_linear, rather than the kernel that encodes positions."""
        if torch.compiler.is_compiling() or transformed():
            return False
        return is_for(self.batch * self.count, self.channels, width, self.feat.dtype)

    def keys_values(self, to_kv: nn.Linear, norm: nn.LayerNorm) -> Tensor:
        if self._fuses() and self._takes_rows(to_kv, norm):
            check_memory("to_kv(norm(tokens))", to_kv.weight, norm.weight, norm.bias)
            gain, shift = norm.weight.to(self.feat.dtype), norm.bias.to(self.feat.dtype)
            return layer_norm_linear_unchecked(self.feat, gain, shift, to_kv.weight, norm.eps)
        projection = self.projection(to_kv, norm)
        if projection is not None:
            return projection.keys_values()
        normalized = self.normalized(norm.eps, autocast_dtype(self.device))
        return F.linear(normalized, *absorb_norm(to_kv, norm, to_kv.weight.dtype))

    def projection(self, to_kv: nn.Linear, norm: nn.LayerNorm) -> Projection | None:
        if not self._fuses() or self._takes_rows(to_kv, norm):
            return None
        weight, bias = absorb_norm(to_kv, norm, to_kv.weight.dtype)
        coords = self.feat.new_empty((*self.feat.shape[:2], 0), dtype=torch.float64)  # of no axis
        return Projection(self.feat, coords, coords.new_empty(0, 0), weight.T, bias, norm.eps, to_kv.weight.dtype)

    def _takes_rows(self, to_kv: nn.Linear, norm: nn.LayerNorm) -> bool:
        """Whether layer_norm_linear makes keys and values."""
        return self._by_rows(len(to_kv.weight)) and to_kv.weight.dtype == self.feat.dtype and norm.eps > 0
