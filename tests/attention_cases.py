"""Sizes of the models and inputs whose attention the tests look at."""

import torch

import perceiver_fast as pf

GRID = dict(
    num_freq_bands=4, depth=3, max_freq=10.0, num_latents=7, latent_dim=16, latent_heads=2, latent_dim_head=8,
    cross_heads=2, cross_dim_head=5, num_classes=6,
)  # fmt: skip
IO = dict(
    depth=2, dim=9, queries_dim=6, logits_dim=4, num_latents=7, latent_dim=16, cross_heads=2, cross_dim_head=5,
    latent_heads=2, latent_dim_head=4,
)  # fmt: skip
IMAGE, DENSE = (5, 6, 3), (3, 23, 9)
MODALITIES = (
    pf.Modality("video", input_channels=3, input_axis=3, num_freq_bands=2, max_freq=6.0),
    pf.Modality("audio", input_channels=1, input_axis=1, num_freq_bands=5, max_freq=30.0),
    pf.Modality("cloud", input_channels=0, input_axis=3, num_freq_bands=3, max_freq=8.0),
)


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def in_float64(model):
    model = model.double()
    for parameter in model.parameters():  # LayerNorms that do something, and attention that is far from uniform
        parameter.data = torch.randn_like(parameter) * 0.5
    return model
