"""Small models of both libraries with the same weights, and inputs. Tests do to both what people do with modules."""

import perceiver_pytorch
import torch
from perceiver_pytorch import experimental as their_experimental
from perceiver_pytorch import gated as their_gated
from perceiver_pytorch import mixed_latents as their_mixed_latents
from torch import nn

import perceiver_fast as pf

HEADS = dict(cross_heads=2, cross_dim_head=8, latent_heads=2, latent_dim_head=8)
GRID = dict(num_freq_bands=4, depth=1, max_freq=8.0, num_latents=6, latent_dim=16, num_classes=5, **HEADS)
IO = dict(depth=1, dim=12, queries_dim=10, logits_dim=7, num_latents=6, latent_dim=16, **HEADS)
LM = dict(dim=12, num_tokens=20, max_seq_len=16, depth=1, num_latents=6, latent_dim=16, **HEADS)
BLOCK = dict(dim=16, context_dim=12, **HEADS)
DENSE = dict(fourier_encode_data=False, input_channels=9)


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def image(seed):
    return dict(data=draw(seed, 2, 6, 5, 3))


def masked_image(seed):
    return image(seed) | dict(mask=draw(seed + 1, 2, 6, 5) > -0.5)


def sequence(seed):
    return dict(data=draw(seed, 2, 9, 12), mask=draw(seed + 1, 2, 9) > -0.5, queries=draw(seed + 2, 2, 5, 10))


def ids(seed):
    return dict(x=torch.randint(0, 20, (2, 11), generator=torch.Generator().manual_seed(seed)))


def latents(seed):
    return dict(x=draw(seed, 2, 6, 16), context=draw(seed + 1, 2, 9, 12), mask=draw(seed + 2, 2, 9) > -0.5)


# name: their class, ours, arguments, inputs of a seed
MODELS = {
    "perceiver": (perceiver_pytorch.Perceiver, pf.Perceiver, GRID, image),
    "perceiver masked, inverted, residual": (
        perceiver_pytorch.Perceiver,
        pf.Perceiver,
        GRID | dict(depth=2, inverted_cross_attn=True, attn_residual=True, attn_residual_rank=4),
        masked_image,
    ),
    "perceiver dense": (
        perceiver_pytorch.Perceiver,
        pf.Perceiver,
        GRID | DENSE,
        lambda s: dict(data=draw(s, 2, 6, 5, 9)),
    ),
    "io": (perceiver_pytorch.PerceiverIO, pf.PerceiverIO, IO | dict(decoder_ff=True), sequence),
    "lm": (perceiver_pytorch.PerceiverLM, pf.PerceiverLM, LM, ids),
    "block": (perceiver_pytorch.PerceiverBlock, pf.PerceiverBlock, BLOCK, latents),
    "block joined": (
        perceiver_pytorch.PerceiverBlock,
        pf.PerceiverBlock,
        BLOCK | dict(context_dim=16, queries_contribute_kv=True),
        lambda seed: latents(seed) | dict(context=draw(seed + 1, 2, 9, 16)),
    ),
    "gated": (their_gated.Perceiver, pf.gated.Perceiver, GRID, masked_image),
    "mixed latents": (their_mixed_latents.Perceiver, pf.mixed_latents.Perceiver, GRID, masked_image),
    "experimental": (
        their_experimental.Perceiver,
        pf.experimental.Perceiver,
        GRID | DENSE | dict(depth=2),
        lambda seed: dict(data=draw(seed, 2, 6, 5, 9)),
    ),
}


def pair(name, change=None, dtype=torch.float32, **extra):
    """perceiver-pytorch's model and ours with its weights; ``change`` is done to each, from one seed."""
    theirs, ours, arguments, _ = MODELS[name]
    torch.manual_seed(0)
    models = theirs(**arguments | extra), ours(**arguments | extra)
    models[1].load_state_dict(models[0].state_dict(), strict=True)
    for model in models:
        model.to(dtype)
        if change is not None:
            torch.manual_seed(1)
            change(model)
    return models


def inputs(name, dtype=torch.float32, seed=1):
    """What the model is called with."""
    given = MODELS[name][3](seed)
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in given.items()}


def modules_of(name, kind=nn.Module):
    """Names of the modules of a kind within a model, as both libraries have them."""
    theirs, ours = pair(name)
    names = [n for n, m in theirs.named_modules() if n and isinstance(m, kind)]
    assert set(names) <= {n for n, _ in ours.named_modules()}
    return names


def agree(values, tolerance=1e-5, where=None):
    """Assert that two tensors, or two lists of them, are the same but for rounding."""
    a, b = ([v] if torch.is_tensor(v) else list(v) for v in values)
    assert len(a) == len(b), where
    for x, y in zip(a, b):
        assert x.shape == y.shape and x.dtype == y.dtype, (where, x.shape, y.shape, x.dtype, y.dtype)
        assert torch.allclose(x, y, rtol=1e-4, atol=tolerance, equal_nan=True), (where, (x - y).abs().max().item())


def step(model, **call):
    """Output, and the gradients of all parameters by name."""
    model.zero_grad()
    out = model(**call)
    out.square().mean().backward()
    return [out.detach(), *(p.grad for _, p in sorted(model.named_parameters()) if p.grad is not None)]


def replace(model, where, change):
    """Put ``change`` of the module at ``where`` in its place."""
    parent, _, name = where.rpartition(".")
    owner = model.get_submodule(parent)
    new = change(owner._modules[name])
    owner._modules[name] = new


class Adapted(nn.Module):
    """An adapter around a layer, as people write it."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 3, bias=False)
        self.up = nn.Linear(3, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))
