"""What several tests need: error measures, random configurations, and models of both libraries with one set of weights."""

import random

import perceiver_pytorch
import torch

import perceiver_fast as pf
from perceiver_fast import extension

needs_extension = dict(
    condition=extension.error is not None, reason=f"the CPU kernels are not there: {extension.error}"
)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of the expected, in float64; zero when both are equal."""
    actual, expected = actual.detach().double(), expected.detach().double()
    if torch.equal(actual, expected):
        return 0.0
    return ((actual - expected).norm() / expected.norm().clamp_min(1e-300)).item()


def grid_inputs(batch, queries, features, sizes, dtype=torch.float64, masked=False, magnitude=1.0, seed=0):
    """Random q, feat, scale and mask of grid attention; with several batch elements the first mask is all False."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q = (draw(batch, queries, features + sum(sizes)) * magnitude).to(dtype)
    feat = draw(batch, *sizes, features).to(dtype)
    scale = (draw(batch, *sizes).abs() + 0.3).to(dtype)
    mask = draw(batch, *sizes) > -0.5 if masked else None
    if masked and batch > 1:
        mask[0] = False
    return q, feat, scale, mask


def random_config(seed: int) -> dict:
    """A random small model and its input: keywords, sizes, batch, and whether it is masked."""
    r = random.Random(seed)
    axes = r.choice([1, 2, 2, 2, 3, 4])
    sizes = tuple(r.choice([1, 2, 3, 5, 7, 9, 13, 16, 17, 31] if axes < 3 else [1, 2, 3, 5, 7]) for _ in range(axes))
    keywords = dict(
        num_freq_bands=r.choice([1, 2, 4, 6, 13]),
        depth=r.choice([1, 2, 3]),
        max_freq=r.choice([4.0, 10.0, 30.0]),
        input_channels=r.choice([1, 2, 3, 3, 4, 6]),
        input_axis=axes,
        num_latents=r.choice([1, 3, 8, 17, 33]),
        latent_dim=r.choice([8, 16, 24]),
        cross_heads=r.choice([1, 1, 2, 3, 4]),
        latent_heads=2,
        cross_dim_head=r.choice([4, 8, 16]),
        latent_dim_head=8,
        num_classes=5,
        weight_tie_layers=r.random() < 0.4,
        self_per_cross_attn=r.choice([0, 1]),
    )
    return dict(keywords=keywords, sizes=sizes, batch=r.choice([1, 2, 3]), masked=r.random() < 0.5)


def model_pair(dtype=torch.float32, **keywords):
    """perceiver-pytorch's model and ours with its weights."""
    theirs = perceiver_pytorch.Perceiver(**keywords)
    ours = pf.Perceiver(**keywords)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs.to(dtype), ours.to(dtype)


def outputs_and_gradients(model, data, mask=None, weight=None, **call):
    """Output, and the gradients of a weighted sum of it by every parameter and by the data."""
    model.zero_grad()
    data = data.clone().requires_grad_()
    out = model(data, mask=mask, **call)
    (out * (torch.ones_like(out) if weight is None else weight.to(out.dtype))).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return out.detach(), gradients | {"data": data.grad}
