"""Random PerceiverIOs of described data and queries against perceiver-pytorch's on the tensors that they stand for.

The tensors are built here, by plain PyTorch: sines and cosines of positions in the order of a layout, beside channels of
their own, through a linear layer. Every way that layers have is taken, whatever the planner counts. With dropout the truth
is the reference backend on the built tensors, which drops the same weights; that is compared in float64 alone, as the
derivative of its softmax is not rounded as that of fused attentions is.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from unittest import mock

import perceiver_pytorch
import torch
from torch import Tensor, nn

import perceiver_fast as pf
from perceiver_fast.layers import Attention, cross_attention, plan, small
from perceiver_fast.models import described
from perceiver_fast.ops.grid_query_attention import GRID_QUERY_ATTENTION

from .models import Built, grid_coords
from .numeric import compare
from .outcome import Outcome
from .values import MASKS, draw_mask, draw_values, fill

PLAIN = {"values": "normal", "mask": "none", "dtype": "float32", "way": "least"} | dict.fromkeys(
    ("data layout", "queries layout"), "perceiver-pytorch"
)
LAYOUTS = ("perceiver-pytorch", "deepmind", "vecset")
BOUND = 1e-10
WAYS = ("least", "grid", "absorbed", "projected")


def draw_description(r: random.Random, what: str, batch: int) -> dict:
    """What describes data or queries, as a flat dict; ``batch`` elements or one that they share."""
    axes = r.choice([1, 2, 3, 4])
    sizes = [r.choice([1, 2, 3, 5]) for _ in range(axes - 1)] + [r.choice([1, 1, 4, 17, 33])]
    drawn = dict(
        sizes=sizes,
        points=r.random() < 0.5,
        bands=r.choice([0, 1, 2, 5, 8]),
        features=r.choice([0, 0, 1, 3, 7]),
        embed=r.choice([0, 0, 1, 6, 40]),  # channels after it; 0: none
        bias=r.random() < 0.8,
        layout=r.choice(LAYOUTS),
        batch=batch,
    )
    return {f"{what} {key}": value for key, value in drawn.items()}


def draw(seed: int) -> dict:
    """A random model, and how its data and queries are described."""
    r = random.Random(seed)
    batch = r.choice([1, 2, 3])
    case = dict(
        seed=seed,
        dtype=r.choice(["float32"] * 5 + ["bfloat16"]),
        threads=r.choice([1, 1, 2]),
        described=r.choice(["both", "data", "queries"]),
        depth=r.choice([0, 0, 1]),
        batch=batch,
        latents=r.choice([1, 2, 5, 9, 33, 70]),
        latent_dim=r.choice([1, 8, 24, 33]),
        heads=r.choice([1, 2, 3]),
        dim_head=r.choice([1, 4, 7, 16, 40]),
        logits=r.choice([0, 1, 5, 33]),  # 0: no last projection
        decoder_ff=r.random() < 0.3,
        norms=r.random() < 0.5,
        sharp=r.choice([1.0, 1.0, 10.0, 100.0]),
        inverted=r.random() < 0.2,
        dropout=r.choice([0.0, 0.0, 0.0, 0.1, 0.5]),
        mask=r.choice(MASKS),
        way=r.choice(WAYS),
        decoder=r.random() < 0.7,  # the decoder takes the description whatever is counted
    )
    harsh = r.random() < 0.3 and not case["dropout"]
    case |= draw_values(r) if harsh else dict(values="normal", magnitude=1.0)
    case |= draw_description(r, "data", r.choice([1, batch]))
    case |= draw_description(r, "queries", r.choice([1, batch]))
    return case | {"in one op": r.random() < 0.5}


def part_of(case: dict, what: str) -> dict:
    """The part of a case that describes data or queries."""
    return {key.removeprefix(f"{what} "): value for key, value in case.items() if key.startswith(f"{what} ")}


def frequencies(bands: int) -> Tensor:
    """Half periods a unit of position, ``[K]``."""
    return 2.0 ** torch.arange(bands, dtype=torch.float64) * 0.5


def width_of(of: dict) -> int:
    """Channels before an embedding."""
    return of["features"] + len(of["sizes"]) * (2 * of["bands"] + 1)


def plainly(
    of: dict, embed: nn.Linear | None, feat: Tensor | None, coords: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The tensor ``[B or 1, M, D]``, by plain PyTorch."""
    positions = (grid_coords(of["sizes"]) if coords is None else coords).double()  # [B or 1, M, A]
    angles = torch.pi * positions.unsqueeze(-1) * frequencies(of["bands"])
    sines, cosines = angles.sin(), angles.cos()  # [B or 1, M, A, K]
    if of["layout"] == "perceiver-pytorch":
        code = torch.cat([sines, cosines, positions.unsqueeze(-1)], -1).flatten(2)
    elif of["layout"] == "deepmind":
        code = torch.cat([positions, sines.flatten(2), cosines.flatten(2)], -1)
    else:
        code = torch.cat([sines.flatten(2), cosines.flatten(2), positions], -1)
    code = code.to(dtype)
    if feat is not None:
        feat = feat.flatten(1, -2)
        batch = max(len(feat), len(code))
        code = torch.cat([feat.expand(batch, -1, -1), code.expand(batch, -1, -1)], -1)
    return code if embed is None else embed(code)


def description(of: dict, embed: nn.Linear | None, feat: Tensor | None, coords: Tensor | None) -> pf.tokens.Description:
    """What the package is given."""
    keywords = dict(frequencies=frequencies(of["bands"]), feat=feat, embed=embed, layout=of["layout"])
    if of["points"]:
        return pf.point_tokens(coords, **keywords)
    return pf.grid_tokens(of["sizes"], **keywords)


class Whole(nn.Module):
    """A PerceiverIO, and the embeddings of its data and queries.

    Args:
        case: says how both are described.
        model: this package's, or perceiver-pytorch's.
    """

    def __init__(self, case: dict, model: nn.Module):
        super().__init__()
        self.case, self.model = case, model
        self.embeds = nn.ModuleDict()
        for what in ("data", "queries"):
            of = part_of(case, what)
            if of["embed"]:
                self.embeds[what] = nn.Linear(width_of(of), of["embed"], bias=of["bias"])

    def given(self, what: str, inputs: dict, plain: bool) -> object:
        """Data or queries: a description, or the tensor for the whole batch."""
        of, embed = part_of(self.case, what), self.embeds[what] if what in self.embeds else None
        feat, coords = inputs.get(f"{what}_feat"), inputs.get(f"{what}_coords")
        if not plain and self.case["described"] in ("both", what):
            return description(of, embed, feat, coords)
        dtype = next(self.model.parameters()).dtype
        built = plainly(of, embed, feat, coords, dtype)
        return built.expand(self.batch() if what == "queries" else of["batch"], -1, -1)

    def batch(self) -> int:
        """How many there are: as many as of the data."""
        return self.case["data batch"]

    def forward(self, plain: bool, mask: Tensor | None = None, **inputs) -> Tensor:
        torch.manual_seed(self.case["seed"])  # of what dropout drops
        return self.model(self.given("data", inputs, plain), mask, queries=self.given("queries", inputs, plain))


def build(case: dict) -> Built:
    """Both models with the same weights, and inputs."""
    if min(case["batch"], case["data batch"], case["queries batch"]) < 1:
        raise ValueError("expected at least one element")
    torch.manual_seed(case["seed"])
    generator = torch.Generator().manual_seed(case["seed"] + 1)
    if not case["data points"] and not case["data features"]:
        case["data batch"] = 1  # of which all elements would be the same
    parts = {what: part_of(case, what) for what in ("data", "queries")}
    width = {what: of["embed"] or width_of(of) for what, of in parts.items()}
    keywords = dict(
        depth=case["depth"], dim=width["data"], queries_dim=width["queries"], logits_dim=case["logits"] or None,
        num_latents=case["latents"], latent_dim=case["latent_dim"], cross_heads=case["heads"], latent_heads=2,
        cross_dim_head=case["dim_head"], latent_dim_head=4, decoder_ff=case["decoder_ff"],
        inverted_cross_attn=case["inverted"],
    )  # fmt: skip
    ours = Whole(case, pf.PerceiverIO(**keywords))
    theirs = pf.PerceiverIO if case["dropout"] else perceiver_pytorch.PerceiverIO
    plain = Whole(case, theirs(**keywords))
    if case["dropout"]:
        for model in (ours.model, plain.model):
            heads = dict(heads=case["heads"], dim_head=case["dim_head"], dropout=case["dropout"])
            model.decoder_cross_attn.fn = Attention(width["queries"], case["latent_dim"], **heads)
            model.cross_attend_block.cross_attn.fn.dropout.p = case["dropout"]
    state = plain.state_dict()
    for name, value in state.items():
        if "norm" in name and case["norms"]:
            value.copy_(torch.randn(value.shape, generator=generator) * 0.5 + (1.0 if name.endswith("weight") else 0.0))
        elif name.endswith("to_q.weight"):
            value.mul_(case["sharp"])
    inputs = {}
    for what, of in parts.items():
        count = torch.Size(of["sizes"]).numel()
        batch = of["batch"] if what == "data" or of["batch"] == case["data batch"] else 1  # or all share the queries
        shape = (batch, *([count] if of["points"] else of["sizes"]))
        if of["features"]:
            feat = fill(case["values"], case["magnitude"], (*shape, of["features"]), generator)
            inputs[f"{what}_feat"] = feat
        if of["points"]:
            inputs[f"{what}_coords"] = torch.rand(shape[0], count, len(of["sizes"]), generator=generator) * 2 - 1
    if case["dtype"] == "bfloat16":  # numbers that it has, so that rounding the inputs is no error
        state = {name: value.bfloat16().float() for name, value in state.items()}
        inputs = {name: value if "coords" in name else value.bfloat16().float() for name, value in inputs.items()}
    inputs["mask"] = draw_mask(
        case["mask"], (case["data batch"], torch.Size(parts["data"]["sizes"]).numel()), generator
    )
    plain.load_state_dict(state)
    ours.load_state_dict(state)

    def run_plain(model: nn.Module, **inputs) -> Tensor:
        if not case["dropout"]:
            return model(True, **inputs)
        with pf.use_backend("reference"), pf.use_linear("torch"):
            return model(True, **inputs)

    return Built(ours, plain, lambda model, **inputs: model(False, **inputs), run_plain, inputs)


@contextmanager
def ways(case: dict) -> Iterator[None]:
    """The case's ways of both cross-attentions, where tokens offer them."""
    planned, planned_decoder = plan.plan_cross_attention, described.plan_decoder

    def encoder(tokens: object, layer: plan.Layer) -> plan.Plan:
        found, way = planned(tokens, layer), case["way"]
        if way not in found.work:
            return found
        choice = plan._grid_choice(tokens, layer) if way == "grid" else plan._dense_choice(way, tokens, layer)
        return replace(found, path=way, taken=choice, uses=tokens.uses(way, layer.heads * layer.dims))

    def decoder(*args: object) -> plan.Plan:
        found = planned_decoder(*args)
        if not case["decoder"] or found.path == "described" or pf.backends.forced_backend() != "auto":
            return found
        choice = GRID_QUERY_ATTENTION.choose(GRID_QUERY_ATTENTION.call(torch.float32, torch.device("cpu")))
        return plan.Plan("described", choice, found.work)

    with (
        mock.patch.object(cross_attention, "plan_cross_attention", encoder),
        mock.patch.object(described, "plan_decoder", decoder),
        nullcontext() if case["in one op"] else mock.patch.object(small, "are_few", lambda latents, channels: False),
    ):
        yield


def run(case: dict) -> Outcome:
    """Compare ours in float64, within 1e-10, and in the case's dtype with the truth."""
    case = dict(case)
    built = build(case)
    outcome = Outcome()
    with ways(case):
        compare(case, built, outcome, BOUND, low=not case["dropout"])
    outcome.counts[f"described {case['described']}"] += 1
    return outcome
