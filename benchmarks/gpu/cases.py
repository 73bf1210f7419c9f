"""What the battery measures: published geometries, and the cases made of them in the order of what they tell.

Nothing here imports torch: ``--help`` and ``--list`` answer at once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from math import prod
from typing import Any

LEVELS = ("op", "model")
BATCHES = (8, 64, 1)
DTYPES = ("bf16", "fp32")
PASSES = ("forward", "step")  # step: forward and backward
HEAD = ("imagenet-lucid", "imagenet-paper", "readme")  # the geometries that tell most


@dataclass(frozen=True)
class Shape:
    """One published model and its input.

    Args:
        name: what the command line and the results call it.
        sizes: the grid, n_1 .. n_A.
        features: raw channels of a token, F.
        latents, latent_dim: N and D.
        dim_head: channels of the cross-attention's one head, d.
        bands, max_freq: of the Fourier codes.
        depth: cross-attentions. Default: 1.
        selfs: latent layers after each. Default: 1.
        tied: whether all blocks but the first share weights. Default: False.
        cut: what the model-level case leaves out of the published model. Default: nothing.
        same_op_as: the geometry whose cross-attention is this one's, which is then not timed twice. Default: none.
        dry: whether it was shrunk for a dry run. Default: False.
    """

    name: str
    sizes: tuple[int, ...]
    features: int
    latents: int
    latent_dim: int
    dim_head: int
    bands: int
    max_freq: float
    depth: int = 1
    selfs: int = 1
    tied: bool = False
    cut: str = ""
    same_op_as: str = ""
    dry: bool = False

    @property
    def tokens(self) -> int:
        """Number of tokens, M."""
        return prod(self.sizes)

    @property
    def channels(self) -> int:
        """Channels of a token as perceiver-pytorch builds it, C."""
        return self.features + len(self.sizes) * (2 * self.bands + 1)

    def arguments(self, level: str) -> dict[str, Any]:
        """Of ``Perceiver``; at op level a model that is one cross-attention, of which only that is called."""
        whole = level == "model"
        return {
            "num_freq_bands": self.bands,
            "max_freq": self.max_freq,
            "depth": self.depth if whole else 1,
            "input_channels": self.features,
            "input_axis": len(self.sizes),
            "num_latents": self.latents,
            "latent_dim": self.latent_dim,
            "cross_dim_head": self.dim_head,
            "weight_tie_layers": self.tied,
            "self_per_cross_attn": self.selfs if whole else 0,
            "num_classes": 1000 if whole else 1,
        }

    def tiny(self) -> Shape:
        """The same structure with few of everything, for a dry run; odd head dimensions stay odd."""
        small = {"latents": 6, "latent_dim": 16, "bands": 2, "depth": min(2, self.depth), "selfs": 1, "dry": True}
        sizes = (5, 6, 4)[: len(self.sizes)]
        dim_head = 8 if self.dim_head % 8 == 0 else 5
        return replace(self, sizes=sizes, features=min(self.features, 9), dim_head=dim_head, **small)


IMAGE = (224, 224)
PAPER = Shape("imagenet-paper", IMAGE, 3, 512, 1024, 261, 64, 224.0, depth=8, selfs=6, tied=True)
SHAPES = {
    shape.name: shape
    for shape in (
        replace(PAPER, name="imagenet-lucid", dim_head=64),
        PAPER,
        Shape("readme", IMAGE, 3, 256, 512, 64, 6, 10.0, depth=6, selfs=2),
        Shape("video", (16, 224, 224), 3, 512, 1024, 64, 64, 224.0, selfs=6, cut="a stress input, no published model"),
        Shape("flow", (368, 496), 64, 2048, 512, 322, 64, 496.0, selfs=24, cut="no decoder; latent heads 8 x 64"),
        replace(
            PAPER, name="hf-fourier", depth=1, tied=False, same_op_as="imagenet-paper",
            cut="6 of the 48 (8 x 6 shared) latent layers; latent heads 8 x 64",
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One line of the table: every side is measured on it."""

    level: str
    geometry: str
    batch: int
    dtype: str
    pass_name: str

    @property
    def name(self) -> str:
        """As ``--case`` and ``--profile`` take it."""
        return f"{self.level}/{self.geometry}/{self.batch}/{self.dtype}/{self.pass_name}"

    @property
    def headline(self) -> bool:
        """Whether the compiled peers, which take seconds to compile, are measured here too."""
        return self.level == "op" and self.geometry in HEAD and (self.pass_name == "forward" or self.batch == 8)

    def shape(self, dry: bool = False) -> Shape:
        """Its geometry, shrunk for a dry run."""
        return SHAPES[self.geometry].tiny() if dry else SHAPES[self.geometry]


def parse_case(text: str) -> Case:
    """The case that :attr:`Case.name` names.

    Raises:
        ValueError: it names none; the message says which part and what it may be.
    """
    parts = text.split("/")
    choices = (LEVELS, tuple(SHAPES), None, DTYPES, PASSES)
    if len(parts) != len(choices):
        raise ValueError(f"expected LEVEL/GEOMETRY/BATCH/DTYPE/PASS, as op/readme/8/bf16/forward, got {text!r}")
    for part, known in zip(parts, choices):
        if known is None and not (part.isdecimal() and int(part) > 0):
            raise ValueError(f"expected a batch size, at least 1, got {part!r} in {text!r}")
        if known is not None and part not in known:
            raise ValueError(f"expected one of {', '.join(known)}, got {part!r} in {text!r}")
    level, geometry, batch, dtype, pass_name = parts
    return Case(level, geometry, int(batch), dtype, pass_name)


def _urgency(case: Case) -> tuple:
    """Sort key: a run that is cut short shall have lost the least."""
    head = case.geometry in HEAD
    stages = {("op", "forward"): 0 if head else 2, ("op", "step"): 1 if head else 4, ("model", "forward"): 3}
    stage = stages.get((case.level, case.pass_name), 5)
    batch = BATCHES.index(case.batch) if case.batch in BATCHES else len(BATCHES)
    return stage, batch, DTYPES.index(case.dtype), list(SHAPES).index(case.geometry)


def select(
    geometries: tuple[str, ...] = (),
    batches: tuple[int, ...] = (),
    dtypes: tuple[str, ...] = (),
    levels: tuple[str, ...] = (),
    passes: tuple[str, ...] = (),
) -> tuple[list[Case], list[dict]]:
    """The cases asked for (nothing asked for: all), the most telling first; and those left out, with the reason."""
    wanted = product(levels or LEVELS, geometries or SHAPES, batches or BATCHES, dtypes or DTYPES, passes or PASSES)
    cases, skipped = [], []
    for case in sorted({Case(*parts) for parts in wanted}, key=_urgency):
        same = SHAPES[case.geometry].same_op_as
        if case.level == "op" and same:
            skipped.append({"case": case.name, "reason": f"the same op as {same}"})
        else:
            cases.append(case)
    return cases, skipped
