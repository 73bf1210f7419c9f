"""Which geometries of the package are measured, at which level, how often, and what memory that takes."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.sides import OURS, SMART, Case
from perceiver_fast.insight.geometries import GEOMETRIES, Geometry

FLOAT32_BYTES = 4
QUICK = "cross-only"
LEAN = (OURS, "sdpa", "compile", SMART)  # peers that build no N x M matrix: they fit where the check does
GRID = ("model", "layer", "grid_attention", "grid_scale")
DENSE = ("model", "layer", "cross_attention")
POINTS = (*DENSE, "fourier_projection")
LATENTS = ("layer_norm", "geglu", "feed_forward", "linear")


@dataclass(frozen=True)
class Plan:
    """How a geometry is measured."""

    levels: tuple[str, ...]  # whole models, one cross-attention layer, or an op by its name
    rounds: int = 5  # timed calls at least; fewer where one takes many seconds
    default: bool = True  # whether it is measured when none is asked for by name


PLANS = {
    "cross-only": Plan(GRID),
    "readme": Plan((*GRID, "grid_query_attention", *LATENTS)),
    "imagenet-lucid": Plan(("model",), rounds=3, default=False),
    "imagenet-lucid-1": Plan(("model", "layer", *LATENTS)),
    "imagenet-paper": Plan((*GRID, "cross_attention"), rounds=3, default=False),
    "hf-fourier": Plan(("model", "layer"), rounds=3, default=False),
    "hf-conv": Plan(GRID, default=False),
    "hf-learned": Plan(DENSE, rounds=3, default=False),
    "flow": Plan(GRID, rounds=3, default=False),
    "kinetics": Plan(DENSE, rounds=3, default=False),
    "language": Plan(DENSE, default=False),
    "video": Plan(GRID, rounds=3, default=False),
    "audio": Plan(("model",), default=False),
    "modelnet": Plan(POINTS, default=False),
    "audio-cross": Plan(POINTS),
    "points": Plan(POINTS),
    "io-512": Plan(DENSE),
    "io-32": Plan(DENSE),
    "small": Plan(("model",)),
    "small-images": Plan(("model",)),
    "small-signal": Plan(("model",)),
    "inverted": Plan(("model",)),
}
assert list(PLANS) == [name for name in PLANS if name in GEOMETRIES]
LEVEL_NAMES = tuple(dict.fromkeys(level for plan in PLANS.values() for level in plan.levels))


def select(names: list[str], everything: bool, levels: list[str]) -> list[str]:
    """Those of ``names``, or of all or the default geometries, that have one of the ``levels``; no levels: any."""
    names = names or [name for name, plan in PLANS.items() if everything or plan.default]
    return [name for name in names if not levels or set(levels) & set(PLANS[name].levels)]


def logits_bytes(geometry: Geometry, batch: int) -> int:
    """Size of one float32 N x M matrix: what perceiver-pytorch builds several of in every cross-attention."""
    return FLOAT32_BYTES * batch * geometry.heads * geometry.queries * geometry.tokens


def eager_bytes(geometry: Geometry, batch: int, layers: int | None = None) -> int:
    """About the most memory that a training step of perceiver-pytorch holds at once.

    Per cross-attention (``layers`` of them; all by default) it keeps the normalised tokens, the logits and the weights for
    the backward pass; the built tokens are shared, and one backward holds about two more of each.
    """
    built = FLOAT32_BYTES * batch * geometry.tokens * geometry.token_channels
    layers = geometry.cross_attentions if layers is None else layers
    return (layers + 3) * built + (2 * layers + 3) * logits_bytes(geometry, batch)


def needs(case: Case) -> dict[str, int]:
    """Memory that the check of a model or a layer takes, and the peers that form N x M matrices, in bytes."""
    geometry = case.geometry
    built = FLOAT32_BYTES * case.batch * geometry.tokens * geometry.token_channels
    found = {"the check against float64": 2 * (geometry.cross_attentions + 3) * built}  # of tokens: it builds no logits
    if case.peer not in LEAN:
        found["perceiver-pytorch"] = eager_bytes(geometry, case.batch, None if case.level == "model" else 1)
    return found
