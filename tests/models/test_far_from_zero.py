"""Input far from zero, and constant input: as exact as perceiver-pytorch's, which takes LayerNorm's mean out of every token."""

import pytest
import torch
from support import check_over_draws, model_pair, relative_error, results

MODEL = dict(
    max_freq=8.0,
    depth=2,
    num_latents=9,
    latent_dim=24,
    cross_dim_head=16,
    latent_heads=2,
    latent_dim_head=8,
    num_classes=5,
)
# By name: the model's arguments, and the input's sizes without its channels.
WAYS = {
    "grid": (dict(num_freq_bands=4, input_channels=3, input_axis=2), (12, 11)),
    "grid of many channels": (dict(num_freq_bands=0, input_channels=100, input_axis=2), (7, 6)),
    "grid of three axes": (dict(num_freq_bands=1, input_channels=30, input_axis=3), (4, 5, 3)),
    "one axis": (dict(num_freq_bands=4, input_channels=5, input_axis=1), (130,)),
    "one axis, positions alone": (dict(num_freq_bands=0, input_channels=64, input_axis=1), (90,)),
    "points": (dict(num_freq_bands=3, input_channels=40, input_axis=1), (70,)),
    "dense, wide": (dict(num_freq_bands=1, input_channels=512, input_axis=1, fourier_encode_data=False), (130,)),
    "dense, narrow": (dict(num_freq_bands=1, input_channels=6, input_axis=2, fourier_encode_data=False), (20, 30)),
}


def half_of(x, value):
    chosen = torch.rand(x.shape[:-1], generator=torch.Generator().manual_seed(2)) < 0.5
    return torch.where(chosen.unsqueeze(-1), torch.full_like(x, value), x)


INPUTS = {
    "mean 1000": lambda x: x + 1000,
    "mean 1e4": lambda x: x + 1e4,
    "half of the tokens 255": lambda x: half_of(x, 255.0),
    "all 255": lambda x: torch.full_like(x, 255.0),
    "all 1e6": lambda x: torch.full_like(x, 1e6),
    "all zero": torch.zeros_like,
    "1e-30 times": lambda x: x * 1e-30,
}


def inputs_of(way, channels, sizes, change, seed):
    """The input for perceiver-pytorch's model and for ours: at positions, ours is told those of the grid."""
    x = change(torch.randn(2, *sizes, channels, generator=torch.Generator().manual_seed(seed)))
    coords = dict(coords=torch.linspace(-1, 1, *sizes, dtype=torch.float64).unsqueeze(-1)) if way == "points" else {}
    return dict(data=x), dict(data=x) | coords


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("way", WAYS)
def test_float32_is_as_exact_as_theirs(way, kind):
    keywords, sizes = WAYS[way]
    rows = []
    # Alone, positions of zeros are plus or minus one token: small gradients are what is left of sums that cancel.
    for seed in range(12 if way == "one axis, positions alone" else 3):
        torch.manual_seed(seed)
        theirs, ours = model_pair(**MODEL, **keywords)
        to_them, to_us = inputs_of(way, keywords["input_channels"], sizes, INPUTS[kind], seed)
        exact = results(theirs, torch.float64, to_them)
        plain, mine = results(theirs, torch.float32, to_them), results(ours, torch.float32, to_us)
        size = torch.stack([value.norm() for value in exact.values()]).norm()
        for name, value in exact.items():
            # The gradient of constant tokens is a difference of nothing but rounding.
            if value.norm() > 1e-7 * size:
                rows.append((name, relative_error(mine[name], value), relative_error(plain[name], value)))
    check_over_draws(rows, floor=1e-6)


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("way", WAYS)
def test_bfloat16_is_as_exact_as_theirs(way, kind):
    keywords, sizes = WAYS[way]
    rows = []
    for seed in (1, 2, 3):
        torch.manual_seed(seed)
        theirs, ours = model_pair(**MODEL, **keywords)
        theirs.bfloat16(), ours.bfloat16()
        to_them, to_us = inputs_of(way, keywords["input_channels"], sizes, INPUTS[kind], seed)
        to_them["data"] = to_us["data"] = to_us["data"].bfloat16().float()
        plain, mine = results(theirs, torch.bfloat16, to_them), results(ours, torch.bfloat16, to_us)
        exact = results(theirs, torch.float64, to_them)
        for name in ("out 0", "latents"):
            rows.append((name, relative_error(mine[name], exact[name]), relative_error(plain[name], exact[name])))
    check_over_draws(rows, floor=1e-2)


@pytest.mark.parametrize("way", WAYS)
def test_one_huge_token_leaves_the_others_alone(way):
    """Its variance overflows in float32, so LayerNorm makes it zero: in perceiver-pytorch, and here."""
    keywords, sizes = WAYS[way]
    theirs, ours = model_pair(**MODEL, **keywords)
    to_them, to_us = inputs_of(way, keywords["input_channels"], sizes, lambda x: x, 1)
    to_us["data"].view(2, -1, keywords["input_channels"])[0, 3] = 1e38
    with torch.no_grad():
        want, got = theirs(**to_them), ours(**to_us)
    if want.isfinite().all():
        assert relative_error(got, want) < 1e-5
    assert got[1].isfinite().all()
    assert relative_error(got[1], want[1]) < 1e-5
