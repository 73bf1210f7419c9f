"""Random models and their inputs: every family, on grids, at points, with tokens of their own encoding, in groups.

A model case is a flat dict of plain data. ``build`` makes of it our model, the plain one with the same weights, and inputs.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import perceiver_pytorch
import plain_multimodal
import torch
from perceiver_pytorch import experimental as their_experimental
from perceiver_pytorch import gated as their_gated
from perceiver_pytorch import mixed_latents as their_mixed_latents
from torch import Tensor, nn

import perceiver_fast as pf
from perceiver_fast import reference

from .values import MASKS, draw_mask, draw_values, fill

FAMILIES = (
    "perceiver",
    "perceiver",
    "perceiver",
    "io",
    "io",
    "lm",
    "gated",
    "experimental",
    "mixed_latents",
    "multimodal",
)
THEIRS = {
    "perceiver": perceiver_pytorch.Perceiver,
    "io": perceiver_pytorch.PerceiverIO,
    "lm": perceiver_pytorch.PerceiverLM,
    "gated": their_gated.Perceiver,
    "experimental": their_experimental.Perceiver,
    "mixed_latents": their_mixed_latents.Perceiver,
}
OURS = {
    "perceiver": pf.Perceiver,
    "io": pf.PerceiverIO,
    "lm": pf.PerceiverLM,
    "gated": pf.gated.Perceiver,
    "experimental": pf.experimental.Perceiver,
    "mixed_latents": pf.mixed_latents.Perceiver,
}
ON_GRIDS = ("perceiver", "gated", "experimental", "mixed_latents")
PLAIN = {"family": "perceiver", "values": "normal", "mask": "none", "input": "grid", "dtype": "float32"}
"""The simplest choices, which failures are made smaller with."""


def draw_sizes(r: random.Random, axes: int, most: int = 600) -> list[int]:
    """Sizes of a grid of at most ``most`` tokens: odd ones, ones, and now and then a long axis."""
    while True:
        choices = [1, 2, 3, 5, 7, 8, 13, 16, 17, 31, 33, 64, 100, 257, 500] if axes < 3 else [1, 2, 3, 4, 5, 7, 9]
        sizes = [r.choice(choices) for _ in range(axes)]
        if torch.Size(sizes).numel() <= most:
            return sizes


def draw_model(r: random.Random) -> dict:
    """A model, its input, and its mask, as a flat dict."""
    family = r.choice(FAMILIES)
    case = dict(
        family=family,
        depth=r.choice([1, 1, 2, 3]),
        batch=r.choice([1, 1, 2, 3]),
        latents=r.choice([1, 2, 5, 8, 17, 33, 70]),
        latent_dim=r.choice([1, 8, 16, 24, 33, 64]),
        cross_heads=r.choice([1, 1, 2, 3, 4]),
        cross_dim_head=r.choice([1, 4, 8, 16, 33, 64]),
        latent_heads=r.choice([1, 2, 3]),
        latent_dim_head=r.choice([1, 4, 8, 17]),
        tied=r.random() < 0.3,
        sharp=r.choice([1.0, 1.0, 1.0, 10.0, 100.0, 1e4]),  # what the queries of cross-attentions are multiplied with
        sharp_self=r.choice([1.0, 1.0, 1.0, 10.0, 100.0]),  # and those of self-attentions
        norms=r.random() < 0.5,  # LayerNorms of random weights and biases
        mask=r.choice(MASKS),
        channels=r.choice([1, 2, 3, 3, 4, 6, 17]),
    )
    case |= draw_values(r)
    if family in ON_GRIDS:
        case |= dict(
            input=r.choice(["grid", "grid", "grid", "points", "dense"] if family != "gated" else ["grid", "points"]),
            sizes=draw_sizes(r, r.choice([1, 2, 2, 2, 3, 4])),
            bands=r.choice([0, 1, 2, 4, 6, 13, 64]),
            max_freq=r.choice([2.0, 4.0, 10.0, 30.0, 224.0]),
        )
        if case["input"] == "dense":
            case["channels"] = r.choice([1, 2, 9, 33, 128, 261, 512])
            if family == "mixed_latents":
                case["input"] = "grid"
    if family == "perceiver":
        case |= dict(per_cross=r.choice([0, 1, 1, 2]), inverted=r.random() < 0.25, residual=r.random() < 0.2)
    if family in ("io", "lm"):
        case |= dict(
            tokens=r.choice([1, 2, 17, 60, 257]),
            inverted=r.random() < 0.25,
            residual=r.random() < 0.3,
            decoder_ff=r.random() < 0.5,
            channels=r.choice([1, 5, 8, 33, 128, 512]),
        )
    if family == "io":
        case |= dict(queries=r.choice([0, 1, 5, 70]), queries_dim=r.choice([1, 4, 7, 12]))
    if family == "multimodal":
        groups = []  # [raw channels, bands, highest frequency, at points, sizes]
        for _ in range(r.choice([1, 2, 2, 3])):
            sizes = draw_sizes(r, r.choice([1, 2, 3]), most=300)
            group = [r.choice([0, 1, 3, 4]), r.choice([0, 2, 5, 16]), r.choice([2.0, 8.0, 30.0]), r.random() < 0.4]
            groups.append([max(1, group[0]) if not group[3] else group[0], *group[1:], sizes])
        case |= dict(groups=groups, per_cross=r.choice([0, 1]), absent=r.random() < 0.2)
        del case["channels"]
    return case


@dataclass
class Built:
    """What a model case makes.

    Args:
        ours: our model, in float32.
        plain: a model with the same weights and names of parameters; its gradients are compared.
        run, run_plain: call a model with the inputs.
        inputs: keyword arguments of the call; tensors, or dicts and tuples of them.
    """

    ours: nn.Module
    plain: nn.Module
    run: Callable
    run_plain: Callable
    inputs: dict


def code_channels(case: dict) -> int:
    """Channels of the positions' codes."""
    return len(case["sizes"]) * (2 * case["bands"] + 1)


def encode(coords: Tensor, case: dict, dtype: torch.dtype) -> Tensor:
    """Codes of positions as perceiver-pytorch's, computed in float64 and rounded once."""
    frequencies = torch.linspace(1.0, case["max_freq"] / 2, case["bands"], dtype=torch.float64)
    return reference.fourier_encode(coords.double(), frequencies.expand(len(case["sizes"]), -1)).to(dtype)


def grid_coords(sizes: list[int]) -> Tensor:
    """Positions of a grid, ``[1, M, A]`` float64."""
    axes = [torch.linspace(-1.0, 1.0, size, dtype=torch.float64) for size in sizes]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(1, -1, len(sizes))


def _call(model: nn.Module, **inputs) -> object:
    return model(**inputs)


def _call_encoded(case: dict, model: nn.Module, data: Tensor, coords: Tensor | None = None, mask: Tensor | None = None):
    """perceiver-pytorch on tokens that are encoded before: its answer at points, which it does not take."""
    codes = encode(grid_coords(case["sizes"]) if coords is None else coords, case, data.dtype)
    flat = data.flatten(1, -2)
    mask = None if mask is None else mask.flatten(1)
    return model(torch.cat([flat, codes.expand(len(flat), -1, -1)], -1), mask=mask)


def _call_reference(model: nn.Module, **inputs) -> object:
    with pf.use_backend("reference"):
        return model(**inputs)


def _keywords(case: dict) -> dict:
    names = ("cross_heads", "cross_dim_head", "latent_heads", "latent_dim_head", "depth", "latent_dim")
    return {name: case[name] for name in names} | dict(num_latents=case["latents"], weight_tie_layers=case["tied"])


def _grid_model(case: dict, generator: torch.Generator) -> tuple[nn.Module, nn.Module, Callable, dict]:
    family, sizes, kind = case["family"], case["sizes"], case["input"]
    codes = dict(num_freq_bands=case["bands"], max_freq=case["max_freq"])
    keywords = _keywords(case) | codes | dict(input_channels=case["channels"], input_axis=len(sizes), num_classes=5)
    if family == "perceiver":
        keywords |= dict(self_per_cross_attn=case["per_cross"], inverted_cross_attn=case["inverted"])
        keywords |= dict(attn_residual=case["residual"], attn_residual_rank=3)
    if kind == "dense":
        keywords["fourier_encode_data"] = False
    ours, run_plain = OURS[family](**keywords), _call
    masked_experimental = family == "experimental" and case["mask"] != "none" and case["depth"] > 1
    if kind == "points" and family in ("gated", "mixed_latents") or masked_experimental:
        plain, run_plain = OURS[family](**keywords), _call_reference  # perceiver-pytorch has no such call
    elif kind == "points" or (family == "experimental" and kind == "grid"):
        encoded = keywords | dict(fourier_encode_data=False, input_axis=1)
        encoded["input_channels"] += code_channels(case)
        plain, run_plain = THEIRS[family](**encoded), partial(_call_encoded, case)
    else:
        plain = THEIRS[family](**keywords)
    shape = (case["batch"], *(sizes if kind != "points" else [torch.Size(sizes).numel()]))
    inputs = dict(data=fill(case["values"], case["magnitude"], (*shape, case["channels"]), generator))
    if kind == "points":
        inputs["coords"] = torch.rand(*shape, len(sizes), generator=generator) * 2 - 1
    inputs["mask"] = draw_mask(case["mask"], shape, generator)
    return ours, plain, run_plain, inputs


def _token_model(case: dict, generator: torch.Generator) -> tuple[nn.Module, nn.Module, Callable, dict]:
    """PerceiverIO and PerceiverLM."""
    family, shape = case["family"], (case["batch"], case["tokens"])
    keywords = _keywords(case) | dict(dim=case["channels"], decoder_ff=case["decoder_ff"])
    keywords |= dict(attn_residual=case["residual"], attn_residual_rank=3, inverted_cross_attn=case["inverted"])
    if family == "lm":
        keywords |= dict(num_tokens=11, max_seq_len=case["tokens"])
        inputs = dict(x=torch.randint(0, 11, shape, generator=generator))
    else:
        keywords |= dict(queries_dim=case["queries_dim"], logits_dim=4)
        inputs = dict(data=fill(case["values"], case["magnitude"], (*shape, case["channels"]), generator))
        if case["queries"]:
            inputs["queries"] = torch.randn(case["queries"], case["queries_dim"], generator=generator)
    inputs["mask"] = draw_mask(case["mask"], shape, generator)
    return OURS[family](**keywords), THEIRS[family](**keywords), _call, inputs


def _multimodal(case: dict, generator: torch.Generator) -> tuple[nn.Module, nn.Module, Callable, dict]:
    modalities, data, masks = [], {}, {}
    for index, (channels, bands, max_freq, points, sizes) in enumerate(case["groups"]):
        name = f"m{index}"
        modalities.append(pf.Modality(name, channels, len(sizes), bands, max_freq))
        if case["absent"] and index and index == len(case["groups"]) - 1:
            continue
        shape = (case["batch"], *([torch.Size(sizes).numel()] if points else sizes))
        data[name] = fill(case["values"], case["magnitude"], (*shape, channels), generator)
        if points:
            data[name] = (data[name], torch.rand(*shape, len(sizes), generator=generator) * 2 - 1)
        if (mask := draw_mask(case["mask"], shape, generator)) is not None:
            masks[name] = mask
    keywords = _keywords(case) | dict(num_classes=5, self_per_cross_attn=case["per_cross"])
    models = [pf.MultimodalPerceiver(modalities, **keywords) for _ in range(2)]
    return *models, plain_multimodal.forward, dict(data=data, mask=masks or None)


def build(case: dict, seed: int) -> Built:
    """Our model, the plain one, and inputs; weights and numbers hang on ``seed`` and the case alone."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    make = (
        _multimodal
        if case["family"] == "multimodal"
        else _token_model
        if case["family"] in ("io", "lm")
        else _grid_model
    )
    ours, plain, run_plain, inputs = make(case, generator)
    state = plain.state_dict()
    for name, value in state.items():
        if "norm" in name and case["norms"]:
            value.copy_(torch.randn(value.shape, generator=generator) * 0.5 + (1.0 if name.endswith("weight") else 0.0))
        elif name.endswith("to_q.weight"):
            crosses = f"{name.removesuffix('fn.to_q.weight')}norm_context.weight" in state
            value.mul_(case["sharp" if crosses else "sharp_self"])
        elif name.endswith("bias") and not case["norms"]:
            value.mul_(0.5)
    if case.get("dtype") == "bfloat16":  # numbers that it has, so that rounding the inputs is no error
        state = {name: value.bfloat16().float() for name, value in state.items()}
        inputs = torch.utils._pytree.tree_map_only(
            Tensor, lambda t: t.bfloat16().float() if t.is_floating_point() else t, inputs
        )
    plain.load_state_dict(state)
    ours.load_state_dict(state)
    return Built(ours, plain, _call, run_plain, inputs)
