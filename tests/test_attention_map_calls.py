"""attention_map and contrasting_latents: defaults, what they leave alone, memory, and errors."""

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from attention_cases import DENSE, GRID, IMAGE, IO, MODALITIES, in_float64, randn
from support import relative_error

import perceiver_fast as pf
from perceiver_fast.tokens import GridTokens


def test_heads_and_defaults():
    model, data = pf.Perceiver(**GRID | dict(num_latents=12)), torch.randn(2, *IMAGE)
    maps = pf.attention_map(model, data)
    assert maps.shape == (2, 2, 8, 5, 6) and not maps.requires_grad
    assert relative_error(pf.attention_map(model, data, heads="mean"), maps.mean(1)) < 1e-6
    assert relative_error(pf.attention_map(model, data, latents=torch.tensor([7])), maps[:, :, 7:]) < 1e-6
    assert relative_error(maps.sum((3, 4)), torch.ones(2, 2, 8)) < 1e-6
    with torch.autocast("cpu", torch.bfloat16):
        cast = pf.attention_map(model, data, 1)
    assert cast.dtype == torch.float32 and relative_error(cast, pf.attention_map(model, data, 1)) < 0.05
    with pf.use_backend("reference"):
        assert relative_error(pf.attention_map(model, data, 2), pf.attention_map(model, data, 2)) < 1e-6


def test_a_model_inside_another():
    class Outer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = pf.Perceiver(**GRID)

        def forward(self, data):
            return self.inner(2 * data)

    outer, data = Outer(), torch.randn(1, *IMAGE)
    assert torch.equal(
        pf.attention_map(outer, data, "inner.layers.2.cross_attn"), pf.attention_map(outer.inner, 2 * data, 2)
    )


def test_modes_hooks_and_gradients_are_left_alone():
    model, data = pf.Perceiver(**GRID | dict(attn_dropout=0.5, ff_dropout=0.5)), torch.randn(1, *IMAGE)
    expected = pf.attention_map(model.eval(), data, 2)
    model.train()
    model.layers[0].cross_ff.eval()  # frozen by its user
    called = []
    handle = model.layers[0].cross_attn.register_forward_pre_hook(lambda *_: called.append(True))
    modes = [module.training for module in model.modules()]
    assert torch.equal(pf.attention_map(model, data, 2), expected)
    pf.contrasting_latents(model, data, 2)
    with pytest.raises(IndexError):
        pf.attention_map(model, data, 5)
    with pytest.raises(ValueError, match="channels"):
        pf.attention_map(model, data[..., :2])
    assert modes == [module.training for module in model.modules()] and torch.is_grad_enabled()
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    assert sum(hooks) == 1 and called
    handle.remove()


def test_two_threads_look_at_one_model():
    model, data = pf.Perceiver(**GRID).eval(), torch.randn(1, *IMAGE)
    expected = [pf.attention_map(model, data, layer) for layer in range(3)]
    with ThreadPoolExecutor(3) as pool:
        for layer, maps in enumerate(pool.map(lambda layer: pf.attention_map(model, data, layer), [0, 1, 2] * 4)):
            assert torch.equal(maps, expected[layer % 3])


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (dict(layer=3), IndexError, r"layer in 0\.\.2, got 3"),
        (dict(layer=-1), IndexError, r"layer in 0\.\.2, got -1"),
        (dict(layer="layers.3.cross_attn"), ValueError, r"one of layers\.0\.cross_attn, .*got 'layers\.3\.cross_attn'"),
        (dict(latents=[1, 7]), IndexError, r"latents in 0\.\.6, got \[7\]"),
        (dict(latents=[-1]), IndexError, r"from 0 on.*got \[-1\]"),
        (dict(latents=[]), IndexError, r"at least one, got \[\]"),
        (dict(heads="max"), ValueError, "'mean' or None, got 'max'"),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        pf.attention_map(pf.Perceiver(**GRID), torch.randn(1, *IMAGE), **arguments)


def test_errors_of_other_models():
    with pytest.raises(TypeError, match="perceiver_fast model, got Linear"):
        pf.attention_map(torch.nn.Linear(2, 2), torch.randn(1, 2))
    model = pf.PerceiverIO(**IO)
    with pytest.raises(
        ValueError, match="'decoder_cross_attn' did not run on this input; ran: cross_attend_block.cross_attn"
    ):
        pf.attention_map(model, torch.randn(*DENSE), "decoder_cross_attn")
    alone = pf.PerceiverBlock(dim=16, has_cross_attn=False, latent_heads=2)
    with pytest.raises(IndexError, match="no cross-attention ran, got 0"):
        pf.attention_map(alone, torch.randn(2, 7, 16))
    assert pf.attention_map(alone, torch.randn(2, 7, 16), "self_attns.0.0.fn").shape == (2, 2, 7, 7)


def test_contrasting_latents_are_those_that_vary_most(monkeypatch):
    model, data = in_float64(pf.Perceiver(**GRID | dict(num_latents=12))), randn(2, *IMAGE)
    maps = pf.attention_map(model, data, 1, range(12), heads="mean").flatten(2)
    order = maps.var(-1).mean(0).argsort(descending=True).tolist()
    for at_once in (1, 500, 2**24):
        monkeypatch.setattr(sys.modules["perceiver_fast.insight.attention_map"], "WEIGHTS", at_once)
        assert pf.contrasting_latents(model, data, 1, 5) == order[:5]
        assert pf.contrasting_latents(model, data, 1, 20) == order
        assert pf.contrasting_latents(model, data, 1, 3, candidates=4) == [n for n in order if n < 4][:3]
    with pytest.raises(ValueError, match="count to be at least 1, got 0"):
        pf.contrasting_latents(model, data, count=0)
    with pytest.raises(ValueError, match="candidates to be at least 1, got 0"):
        pf.contrasting_latents(model, data, candidates=0)


def test_contrast_of_modalities_is_over_all_of_them():
    keywords = {k: v for k, v in GRID.items() if k not in ("num_freq_bands", "max_freq")}
    model = in_float64(pf.MultimodalPerceiver(MODALITIES, **keywords))
    data = {"audio": randn(1, 23, 1), "video": randn(1, 2, 3, 4, 3)}
    maps = pf.attention_map(model, data, latents=range(7), heads="mean")
    joined = torch.cat([maps["video"].flatten(2), maps["audio"]], -1)
    assert pf.contrasting_latents(model, data, count=7) == joined.var(-1)[0].argsort(descending=True).tolist()


def test_no_attention_matrix_exists():
    """A million tokens, 512 latents: the matrix would be 2 GB."""
    model = pf.Perceiver(num_freq_bands=2, depth=1, max_freq=4.0, num_latents=512, latent_dim=16, cross_dim_head=8)
    data = torch.zeros(1, 1000, 1000, 3)
    assert isinstance(model.describe(data), GridTokens)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        maps = pf.attention_map(model, data, latents=[5])
    largest = max(event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")
    assert maps.shape == (1, 1, 1, 1000, 1000) and largest <= 3 * 4 * 10**6  # of the input's size


@pytest.mark.parametrize("module", ["", "gated", "mixed_latents", "experimental"])
def test_every_name_that_explain_prints(module):
    model = getattr(pf, module).Perceiver(**GRID) if module else pf.Perceiver(**GRID)
    data = torch.randn(1, *IMAGE)
    paths = pf.explain(model, data).layers
    names = [path.layer for path in paths if path.path or path.choice.op == "self_attention"]
    assert len(names) >= 3
    for name in names:
        assert pf.attention_map(model, data, name, latents=[0]).shape[:1] == (1,)


def test_latents_that_are_as_many_as_pixels_are_no_picture():
    model = pf.Perceiver(**GRID | dict(num_latents=30))
    data = torch.randn(1, *IMAGE)
    assert pf.attention_map(model, data, "layers.0.self_attns.0.0").shape == (1, 2, 8, 30)
    assert pf.attention_map(model, data, "layers.0.cross_attn").shape == (1, 2, 8, 5, 6)
