"""What cross_attention expects of its arguments, said in full when something else comes."""

from __future__ import annotations

from torch import Tensor

from perceiver_fast.ops.checks import check_alike, check_dropout, check_mask

OP = "cross_attention"


def check(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, inverted: bool, return_lse: bool
) -> None:
    """Raises TypeError or ValueError with what was expected and got."""
    check_alike(OP, q=q, k=k, v=v)
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.dim() != 4:
            raise ValueError(f"{OP}: expected {name} [B, H, rows, channels], got shape {tuple(t.shape)}")
        if t.shape[:2] != q.shape[:2]:
            raise ValueError(
                f"{OP}: expected {name} of q's batch size and heads {tuple(q.shape[:2])}, got {tuple(t.shape[:2])}"
            )
    if k.shape[2] == 0 or v.shape[2] != k.shape[2]:
        raise ValueError(
            f"{OP}: expected k and v of the same number of tokens, at least one, got {k.shape[2]} and {v.shape[2]}"
        )
    if k.shape[3] != q.shape[3] or k.shape[3] == 0:
        raise ValueError(f"{OP}: expected k of q's channels, at least one, got {q.shape[3]} and {k.shape[3]}")
    check_dropout(OP, dropout)
    if inverted and return_lse:
        raise ValueError(f"{OP}: inverted attention has no log-sum-exp over the tokens; leave return_lse out")
    check_mask(OP, mask, (q.shape[0], k.shape[2]), q, "q")
