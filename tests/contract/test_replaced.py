"""Layers that do more than their parameters show, and layers that were replaced: adapters, pruning, the user's own."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from contract_cases import MODELS, Adapted, agree, inputs, modules_of, pair, replace, step
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune


class AdaptedLinear(nn.Linear):
    """The same as a subclass."""

    def __init__(self, base):
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None)
        self.weight, self.bias = base.weight, base.bias
        self.down = nn.Parameter(0.2 * torch.randn(3, base.in_features))
        self.up = nn.Parameter(0.2 * torch.randn(base.out_features, 3))

    def forward(self, x):
        return super().forward(x) + x @ self.down.T @ self.up.T


def with_bias(base):
    new = nn.Linear(base.in_features, base.out_features)
    new.weight = base.weight
    return new


def without_bias(base):
    new = nn.Linear(base.in_features, base.out_features, bias=False)
    new.weight = base.weight
    return new


def pruned(base):
    return prune.l1_unstructured(base, "weight", 0.5)


def weight_normed(base):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(base)


def parametrized(base):
    parametrize.register_parametrization(base, "weight", nn.Hardtanh(-0.05, 0.05))
    return base


def its_own_forward(base):
    base.forward = lambda x: 2 * F.linear(x, base.weight, base.bias)
    return base


LINEAR = [Adapted, AdaptedLinear, with_bias, without_bias, pruned, weight_normed, parametrized, its_own_forward]
LINEAR.append(parametrizations.orthogonal)


@pytest.mark.parametrize("change", LINEAR, ids=lambda c: c.__name__)
@pytest.mark.parametrize("name", MODELS)
def test_linear_layers_one_by_one(name, change):
    for where in modules_of(name, nn.Linear):
        models = pair(name, change=lambda m: replace(m, where, change))
        agree([step(m, **inputs(name)) for m in models], where=where)


@pytest.mark.parametrize("change", [Adapted, pruned, weight_normed], ids=lambda c: c.__name__)
@pytest.mark.parametrize("name", MODELS)
def test_all_linear_layers_at_once_in_training(name, change):
    """Three steps of an optimizer, and the outputs after them."""

    def all_of_them(model):
        for where in modules_of(name, nn.Linear):
            replace(model, where, change)

    results = []
    for model in pair(name, change=all_of_them):
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(**inputs(name)).square().mean().backward()
            optimizer.step()
        results.append(model.eval()(**inputs(name)).detach())
    agree(results, 1e-4)


def norms(width):
    return [
        nn.RMSNorm(width),
        nn.LayerNorm(width, bias=False),
        nn.LayerNorm(width, elementwise_affine=False),
        nn.LayerNorm(width, eps=0.1),
        nn.Identity(),
    ]


@pytest.mark.parametrize("index", range(5))
@pytest.mark.parametrize("name", MODELS)
def test_norms_of_other_kinds(name, index):
    for where in modules_of(name, nn.LayerNorm):
        models = pair(name, change=lambda m: replace(m, where, lambda old: norms(old.normalized_shape[0])[index]))
        agree([step(m, **inputs(name)) for m in models], where=where)


class Own(nn.Module):
    """A user's layer in the place of another; it records what it was called with."""

    def __init__(self, width):
        super().__init__()
        self.norm, self.linear, self.given = nn.LayerNorm(width), nn.Linear(width, width), None

    def forward(self, x, **keywords):
        self.given = {k: (type(v), getattr(v, "shape", v)) for k, v in keywords.items()}
        context = keywords.get("context")
        return self.linear(self.norm(x)) + (0.0 if context is None else context.mean())


class Pass(nn.Module):
    """An identity that takes a context."""

    def forward(self, x, **keywords):
        return x


@pytest.mark.parametrize("name", MODELS)
def test_whole_layers_replaced(name):
    from perceiver_pytorch.perceiver_io import PreNorm as their_io_norm
    from perceiver_pytorch.perceiver_pytorch import PreNorm as their_norm

    for where in modules_of(name, (their_norm, their_io_norm)):
        if "decoder" in where:  # the decoder has another width
            continue
        models = pair(name, change=lambda m: replace(m, where, lambda old: Own(old.norm.normalized_shape[0])))
        agree([step(m, **inputs(name)) for m in models], where=where)
        given = [m.get_submodule(where).given for m in models]
        assert given[0] == given[1], where
        models = pair(name, change=lambda m: replace(m, where, lambda old: Pass()))
        agree([step(m, **inputs(name)) for m in models], where=where)


class Block(nn.Module):
    """A user's block is called with what perceiver-pytorch's blocks are called with."""

    def __init__(self, width=16):
        super().__init__()
        self.given, self.linear = None, nn.Linear(width, width)

    def forward(self, x, context=None, mask=None, inverted_attention=False):
        self.given = type(x), x.shape, type(context), getattr(context, "shape", None), mask, inverted_attention
        return x + self.linear(x) + (0.0 if context is None else context.mean())


@pytest.mark.parametrize("name", ["perceiver", "perceiver dense", "io"])
def test_blocks_replaced(name):
    for where in ("layers.0", "layers.1"):
        models = pair(name, change=lambda m: replace(m, where, lambda old: Block()), depth=2)
        agree([step(m, **inputs(name)) for m in models])
        given = [m.get_submodule(where).given for m in models]
        assert given[0] == given[1]


class Counted(nn.Module):
    """A module in the place of the dropout of attention weights sees all weights."""

    def forward(self, weights):
        self.shape = weights.shape
        return weights * 0.5


@pytest.mark.parametrize("new", [nn.Identity, Counted, lambda: nn.Dropout1d(0.0)])
@pytest.mark.parametrize("name", MODELS)
def test_dropout_replaced(name, new):
    for where in modules_of(name, nn.Dropout):
        models = pair(name, change=lambda m: replace(m, where, lambda old: new()))
        agree([step(m, **inputs(name)) for m in models], where=where)


@pytest.mark.parametrize("name", MODELS)
def test_dropout_of_probability_one_of_a_layer_that_learns(name):
    """With p = 1, training drops all weights, and draws no random number that perceiver-pytorch does not."""
    for where in modules_of(name, nn.Dropout):
        models = pair(name, change=lambda m: setattr(m.get_submodule(where), "p", 1.0))
        agree([m.train()(**inputs(name)).detach() for m in models], where=where)
        agree([m.eval()(**inputs(name)).detach() for m in models], where=where)


@pytest.mark.parametrize("name", MODELS)
def test_plain_attributes_count(name):
    """``scale`` of an attention, ``eps`` of a norm and ``p`` of a dropout may be set after building."""
    from perceiver_pytorch.perceiver_io import Attention as their_io_attention
    from perceiver_pytorch.perceiver_pytorch import Attention as their_attention

    for where in modules_of(name, (their_attention, their_io_attention)):
        models = pair(name, change=lambda m: setattr(m.get_submodule(where), "scale", 0.9))
        with torch.no_grad():
            agree([m.eval()(**inputs(name)) for m in models], where=where)
