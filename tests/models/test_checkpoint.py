"""Activation checkpointing: the same numbers, less memory."""

import pytest
import torch
from support import relative_error

import perceiver_fast as pf

GRID = dict(
    num_freq_bands=3, max_freq=8.0, num_latents=6, latent_dim=16, num_classes=5, attn_dropout=0.2, ff_dropout=0.1
)
IO = dict(dim=9, queries_dim=6, logits_dim=5, num_latents=6, latent_dim=16, seq_dropout_prob=0.2)


def image():
    return torch.randn(2, 7, 6, 3, generator=torch.Generator().manual_seed(1))


MODELS = {
    "perceiver": (lambda **k: pf.Perceiver(depth=3, attn_residual=True, **GRID, **k), lambda m: m(image())),
    "inverted": (lambda **k: pf.Perceiver(depth=2, inverted_cross_attn=True, **GRID, **k), lambda m: m(image())),
    "coords": (
        lambda **k: pf.Perceiver(depth=2, **GRID, **k),
        lambda m: m(image().flatten(1, 2), coords=torch.linspace(-1, 1, 84).view(42, 2)),
    ),
    "gated": (lambda **k: pf.gated.Perceiver(depth=2, **GRID, **k), lambda m: m(image())),
    "mixed_latents": (lambda **k: pf.mixed_latents.Perceiver(depth=2, **GRID, **k), lambda m: m(image())),
    "experimental": (lambda **k: pf.experimental.Perceiver(depth=2, **GRID, **k), lambda m: m(image())),
    "io": (
        lambda **k: pf.PerceiverIO(depth=2, decoder_ff=True, **IO, **k),
        lambda m: m(image().flatten(1, 2).repeat(1, 1, 3), queries=torch.ones(4, 6)),
    ),
    "lm": (
        lambda **k: pf.PerceiverLM(dim=12, num_tokens=50, max_seq_len=64, depth=1, num_latents=8, latent_dim=16, **k),
        lambda m: m(torch.arange(30).view(1, 30)),
    ),
    "multimodal": (
        lambda **k: pf.MultimodalPerceiver(
            [pf.Modality("image", 3, 2, num_freq_bands=3, max_freq=8.0)], depth=2, num_latents=6, latent_dim=16, **k
        ),
        lambda m: m({"image": image()}),
    ),
}


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", MODELS)
def test_the_same_numbers(name, backend):
    build, call = MODELS[name]
    results = []
    for checkpoint in (False, True):
        torch.manual_seed(0)
        model = build(checkpoint=checkpoint).train()
        torch.manual_seed(3)  # what dropout drops, too
        with pf.use_backend(backend):
            out = call(model)
            out.square().sum().backward()
        results.append([out, *(p.grad for p in model.parameters())])
    for kept, computed in zip(*results):
        assert (kept is None) == (computed is None)
        if kept is not None:
            assert relative_error(computed, kept) < 1e-6


def kept_numbers(model, x):
    seen = {}

    def pack(t):
        seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes() // 4
        return t

    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = model(x)
    return out, sum(n for pointer, n in seen.items() if pointer not in weights)


def test_only_blocks_inputs_are_kept():
    arguments = GRID | dict(attn_dropout=0.0, ff_dropout=0.0)
    torch.manual_seed(0)
    model = pf.Perceiver(depth=4, self_per_cross_attn=2, **arguments)
    _, everything = kept_numbers(model, image())
    model.checkpoint = True  # can be switched later, too
    _, little = kept_numbers(model, image())
    assert little * 10 < everything
    with torch.no_grad():
        assert torch.equal(model(image()), model(image()))
