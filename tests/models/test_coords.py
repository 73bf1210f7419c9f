"""Tokens at arbitrary positions in place of a grid: against the grid, and against a plain statement."""

import pytest
import torch
from perceiver_pytorch import Perceiver as Theirs
from support import check_float32, compare_models, relative_error

import perceiver_fast as pf
from perceiver_fast import experimental, gated, mixed_latents, reference
from perceiver_fast.tokens import PointTokens

SMALL = dict(
    num_freq_bands=3, depth=2, max_freq=9.0, num_latents=6, latent_dim=12, latent_heads=2, latent_dim_head=5,
    cross_heads=2, cross_dim_head=4, num_classes=5,
)  # fmt: skip
MODELS = {
    "perceiver": pf.Perceiver,
    "gated": gated.Perceiver,
    "mixed_latents": mixed_latents.Perceiver,
    "experimental": experimental.Perceiver,
}


def positions_of_grid(*sizes):
    axes = [torch.linspace(-1.0, 1.0, size, dtype=torch.float64) for size in sizes]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2)


def outputs_and_gradients(model, data, **call):
    model.zero_grad()
    data = data.clone().requires_grad_()
    out = model(data, **call)
    out.square().sum().backward()
    return [out.detach(), data.grad.flatten(1, -2), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("sizes", [(7,), (5, 4), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_coordinates_of_a_grid_give_what_the_grid_gives(name, sizes, masked):
    model = MODELS[name](**SMALL, input_axis=len(sizes)).double()
    data, mask = torch.randn(2, *sizes, 3, dtype=torch.float64), None
    if masked:
        mask = torch.rand(2, *sizes) > 0.4
        mask[0] = False
    expected = outputs_and_gradients(model, data, mask=mask)
    mask = None if mask is None else mask.flatten(1)
    for coords in (positions_of_grid(*sizes), positions_of_grid(*sizes).expand(2, -1, -1)):
        actual = outputs_and_gradients(model, data.flatten(1, -2), mask=mask, coords=coords)
        assert len(actual) == len(expected)
        for a, b in zip(actual, expected):
            assert relative_error(a, b) < 1e-10 or (a - b).norm() < 1e-13


class Encoded(torch.nn.Module):
    """perceiver-pytorch's model, given the codes of the positions as channels."""

    def __init__(self, model, frequencies):
        super().__init__()
        self.model, self.frequencies = model, frequencies

    def forward(self, data, coords, mask=None):
        codes = reference.fourier_encode(coords.double(), self.frequencies).to(data.dtype)
        return self.model(torch.cat([data, codes.expand(len(data), -1, -1)], -1), mask=mask)


class Wrapped(torch.nn.Module):
    """Ours, under the same parameter names."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, data, coords, mask=None):
        return self.model(data, mask=mask, coords=coords)


@pytest.mark.parametrize("channels", [0, 1, 3])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_random_positions(channels, shared, masked):
    """Outputs and all gradients, of coordinates too, are those of perceiver-pytorch on encoded input."""
    rows = []
    for drawn in range(16):  # results of one draw round alike, and six were too few for a mean
        torch.manual_seed(drawn)
        ours = pf.Perceiver(**SMALL, input_channels=channels, input_axis=3)
        theirs = Theirs(**SMALL, input_channels=ours.input_dim, input_axis=1, fourier_encode_data=False)
        theirs.load_state_dict(ours.state_dict(), strict=True)
        frequencies = torch.linspace(1.0, 4.5, 3, dtype=torch.float64).expand(3, -1)
        inputs = dict(data=torch.randn(2, 40, channels), coords=torch.rand(40, 3) if shared else torch.rand(2, 40, 3))
        inputs["mask"] = torch.rand(2, 40) > 0.5 if masked else None
        found = compare_models(Encoded(theirs, frequencies), Wrapped(ours), inputs, noise=1e-13)
        rows += [(drawn, *row) for row in found]
    check_float32(rows)


def test_float64_positions_keep_their_digits():
    """Positions that differ in the tenth digit, at a frequency that shows it."""
    model = pf.Perceiver(**SMALL | dict(max_freq=2e9), input_axis=1)
    data, coords = torch.randn(1, 30, 3), torch.rand(30, 1, dtype=torch.float64)
    exact = pf.Perceiver(**SMALL | dict(max_freq=2e9), input_axis=1).double()
    exact.load_state_dict(model.state_dict())
    expected = exact(data.double(), coords=coords)
    assert relative_error(model(data, coords=coords), expected) < 1e-5
    assert relative_error(model(data, coords=coords.float()), expected) > 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_description_and_other_ways_to_run(name):
    model = MODELS[name](**SMALL, input_axis=3)
    data, coords, mask = torch.randn(2, 11, 3), torch.rand(2, 11, 3), torch.rand(2, 11) > 0.3
    expected = model(data, mask=mask, coords=coords)
    tokens = model.describe(data, coords)
    assert tokens.materialize().shape == (2, 11, model.input_dim)
    assert isinstance(tokens, PointTokens) or name == "experimental"
    with pf.use_backend("reference"):
        assert relative_error(model(data, mask=mask, coords=coords), expected) < 1e-5
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert relative_error(compiled(data, mask=mask, coords=coords), expected) < 1e-5
    assert model(data[:0], coords=coords[0]).shape == (0, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert relative_error(model(data, mask=mask, coords=coords), expected) < 0.1
    explained = pf.explain(model, data, coords=coords)
    assert explained.layers[0].choice.op == "cross_attention" and "11 tokens" in str(explained)


DATA, COORDS = torch.randn(2, 9, 3), torch.rand(2, 9, 3)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "inputs, error, words",
    [
        (dict(coords=[1.0]), TypeError, "coords to be a torch.Tensor, got list"),
        (dict(coords=COORDS.int()), TypeError, r"floating-point coords, got torch.int32.*coords\.double\(\)"),
        (dict(coords=COORDS[0, 0]), ValueError, r"coords \[9, 3\] or \[2, 9, 3\].*got \(3,\)"),
        (dict(coords=COORDS[None]), ValueError, r"got \(1, 2, 9, 3\)"),
        (dict(coords=COORDS[..., :2]), ValueError, r"3 a token \(input_axis=3\), got \(2, 9, 2\).*another input_axis"),
        (dict(coords=COORDS[:, :8]), ValueError, r"every token of data \(2, 9, 3\), got \(2, 8, 3\).*pad"),
        (dict(coords=torch.rand(3, 9, 3)), ValueError, r"got \(3, 9, 3\).*leave out the batch"),
        (dict(coords=COORDS.to("meta")), ValueError, "coords on cpu.*got meta"),
        (dict(data=torch.randn(2, 9, 9, 9, 3)), ValueError, "data of 3 dimensions.*got 5.*flatten the positions"),
        (dict(data=DATA[..., :2]), ValueError, "3 channels last.*got 2.*input_channels=2"),
        (dict(mask=torch.ones(2, 8) > 0), ValueError, r"mask of shape \(2, 9\), got \(2, 8\)"),
    ],
)
def test_errors(name, inputs, error, words):
    with pytest.raises(error, match=words):
        MODELS[name](**SMALL, input_axis=3)(**dict(data=DATA, coords=COORDS) | inputs)


def test_input_with_its_own_encoding_has_no_coordinates():
    model = pf.Perceiver(**SMALL, input_axis=1, fourier_encode_data=False)
    with pytest.raises(ValueError, match="no coords with fourier_encode_data=False"):
        model(DATA, coords=COORDS)
