"""plot_attention_map: what is drawn of every kind of input, on which colour scales; and its errors."""

import pytest
import torch

import perceiver_fast as pf

pytest.importorskip("matplotlib")
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from warm_python import python


def maps_of(*sizes, latents=3):
    """Random maps ``[latents, *sizes]``, each of sum one."""
    return torch.rand(latents, *sizes).flatten(1).softmax(1).view(latents, *sizes)


def coloured(figure):
    """What is coloured by attention: its values and norm, in the order drawn."""
    found = []
    for axes in figure.axes:
        for drawn in [*axes.images, *axes.collections]:
            if drawn.get_cmap().name == "inferno" and axes.get_label() != "<colorbar>":
                found.append((torch.as_tensor(drawn.get_array()).squeeze().float(), drawn.norm))
    return found


def titles(figure):
    return [axes.get_title() or axes.get_ylabel() for axes in figure.axes if axes.get_label() != "<colorbar>"]


def bars(figure):
    return [axes for axes in figure.axes if axes.get_label() == "<colorbar>"]


@pytest.mark.parametrize("channels", [None, 0, 1, 3, 5])
def test_image(channels, tmp_path):
    maps, data = maps_of(5, 6), None if channels is None else torch.randn(5, 6, channels)
    figure = pf.plot_attention_map(maps, data, latents=[4, 0, 7], title="here", caption="words " * 50)
    for values, (drawn, norm) in zip(maps, coloured(figure), strict=True):
        assert torch.allclose(drawn, 30 * values) and norm.vmin == 0
    shown = [title for title in titles(figure) if title]
    assert shown == ["5 x 6 tokens"] * bool(channels) + ["latent 4", "latent 0", "latent 7"]
    assert len(bars(figure)) == 1 and figure.get_suptitle() == "here"
    figure.savefig(tmp_path / "image.png")
    assert (tmp_path / "image.png").read_bytes().startswith(b"\x89PNG")


def test_colours_of_the_data():
    """Images in [0, 1] are shown as they are, others scaled as a whole; and never outside."""
    inside, outside = torch.rand(4, 4, 3) / 2, 3 * torch.randn(4, 4, 3)
    for data, expected in ((inside, inside), (outside, (outside - outside.min()) / (outside.max() - outside.min()))):
        panel = pf.plot_attention_map(maps_of(4, 4), data).axes[0]
        assert torch.allclose(torch.as_tensor(panel.images[0].get_array()), expected, atol=1e-6)


def test_video_is_evenly_spaced_frames():
    maps, data = maps_of(16, 4, 5, latents=2), torch.randn(16, 4, 5, 1)
    figure = pf.plot_attention_map(maps, data, frames=4)
    assert [title for title in titles(figure) if title.startswith("frame")] == [f"frame {n}" for n in (0, 5, 10, 15)]
    drawn = coloured(figure)
    assert len(drawn) == 2 * 4 and len(bars(figure)) == 1
    assert torch.allclose(drawn[5][0], 320 * maps[1, 5])
    assert len(coloured(pf.plot_attention_map(maps[:, :3], frames=4))) == 2 * 3


@pytest.mark.parametrize("channels", [None, 1, 4])
def test_sound(channels, tmp_path):
    maps, data = maps_of(40), None if channels is None else torch.randn(40, channels)
    figure = pf.plot_attention_map(maps, data)
    for values, (drawn, _) in zip(maps, coloured(figure), strict=True):
        assert torch.allclose(drawn, 40 * values)
    panel = figure.axes[0]
    assert panel.get_ylabel() == "latent 0"
    assert (len(panel.lines), len(panel.collections)) == {None: (0, 0), 1: (1, 0), 4: (0, 1)}[channels]
    figure.savefig(tmp_path / "sound.png")


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("channels", [None, 0, 2])
def test_points(axes, channels):
    maps, coords = maps_of(25), torch.rand(25, axes)
    figure = pf.plot_attention_map(maps, None if channels is None else torch.randn(25, channels), coords)
    for values, (drawn, _) in zip(maps, coloured(figure), strict=True):
        assert torch.allclose(drawn, 25 * values)
    assert (figure.axes[0].name == "3d") == (axes == 3)
    if axes == 2:
        assert torch.allclose(torch.as_tensor(figure.axes[0].collections[0].get_offsets().data).float(), coords)


def test_modalities_are_rows_with_their_shares():
    weights = maps_of(24 + 10 + 7, latents=2)
    maps = dict(zip(("video", "audio", "cloud"), weights.split([24, 10, 7], 1)))
    maps["video"] = maps["video"].view(2, 2, 3, 4)
    data = {"video": torch.rand(2, 3, 4, 3), "audio": torch.randn(10, 4), "cloud": (torch.rand(7, 0), torch.rand(7, 3))}
    for given in (data, None, {"audio": data["audio"]}):
        if given is None or "cloud" not in given:  # without positions points are a row of tokens
            figure = pf.plot_attention_map(maps, given)
        else:
            figure = pf.plot_attention_map(maps, given, latents=[1, 5])
        norms = {id(norm) for _, norm in coloured(figure)}
        assert len(norms) == 1 and len(bars(figure)) == 3 and len(figure.subfigs) == 3
        for room, values in zip(figure.subfigs, maps.values()):
            share = float(values.sum()) / 2
            assert f"{share:.0%} of the attention" in room.get_suptitle()
    drawn = coloured(pf.plot_attention_map(maps, data))
    assert torch.allclose(drawn[-1][0], 41 * maps["cloud"][1])  # relative to uniform over all of them


def test_scales():
    maps = maps_of(10, 10)
    maps[2] *= 100
    together = {(norm.vmin, norm.vmax) for _, norm in coloured(pf.plot_attention_map(maps))}
    assert len(together) == 1
    figure = pf.plot_attention_map(maps, shared=False, scale="log")
    apart = [norm for _, norm in coloured(figure)]
    assert len(bars(figure)) == 3 and all(isinstance(norm, LogNorm) for norm in apart)
    for values, norm in zip(maps * 100, apart):
        ordered = values.flatten().sort().values
        assert (norm.vmin, norm.vmax) == pytest.approx((float(ordered[1]), float(ordered[98])))
    labels = [label.get_text() for label in bars(figure)[0].get_yticklabels()]
    assert labels and all(float(label) > 0 for label in labels)


@pytest.mark.parametrize("scale", ["linear", "log"])
@pytest.mark.parametrize("values", [0.0, 1 / 30], ids=["masked", "uniform"])
def test_flat_maps_are_drawn(scale, values, tmp_path):
    figure = pf.plot_attention_map(torch.full((2, 5, 6), values), torch.zeros(5, 6, 1), scale=scale)
    figure.savefig(tmp_path / "flat.png")
    assert len(coloured(figure)) == 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_maps_of_a_model(dtype):
    model = pf.Perceiver(num_freq_bands=2, depth=1, max_freq=4.0, num_latents=4, latent_dim=8).to(dtype)
    image = torch.rand(1, 6, 5, 3).to(dtype)
    maps = pf.attention_map(model, image, latents=[0, 2], heads="mean")
    assert len(coloured(pf.plot_attention_map(maps[0], image[0], latents=[0, 2]))) == 2


def test_columns():
    for columns, expected in ((1, (4, 1)), (2, (2, 2)), (4, (1, 4)), (9, (1, 4))):
        figure = pf.plot_attention_map(maps_of(5, 6), torch.rand(5, 6, 1), columns=columns)
        grid = figure.axes[0].get_subplotspec().get_gridspec()
        assert (grid.nrows, grid.ncols) == expected


def test_drawn_in_a_given_figure():
    given = Figure(figsize=(4, 3))
    assert pf.plot_attention_map(maps_of(5, 6), figure=given) is given
    rooms = Figure(layout="constrained").subfigures(2, 1)
    assert pf.plot_attention_map(maps_of(5, 6), figure=rooms[1], title="second") is rooms[1]
    assert not rooms[0].axes and rooms[1].get_suptitle() == "second"


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (dict(maps=[1.0]), TypeError, "maps to be a torch.Tensor, got list"),
        (dict(maps=maps_of(5, 6), data=[[1.0]]), TypeError, "data to be a torch.Tensor, got list"),
        (dict(maps=torch.rand(5)), ValueError, r"1 to 3 axes, got \(5,\).*heads='mean'"),
        (dict(maps=torch.rand(1, 2, 3, 4, 5)), ValueError, r"one example.*got \(1, 2, 3, 4, 5\)"),
        (
            dict(maps=maps_of(5, 6), data=torch.rand(1, 5, 6, 3)),
            ValueError,
            r"\(5, 6, 'channels'\).*got \(1, 5, 6, 3\)",
        ),
        (dict(maps=maps_of(7), coords=torch.rand(6, 3)), ValueError, r"\[points, 1 to 3\].*got \(6, 3\)"),
        (dict(maps=maps_of(7), coords=torch.rand(7, 4)), ValueError, r"got \(7, 4\)"),
        (dict(maps=maps_of(5, 6), coords=torch.rand(30, 2)), ValueError, r"maps \(3, 5, 6\)"),
        (dict(maps=maps_of(7), latents=[1, 2]), ValueError, r"latents \[1, 2\], got maps of \[3\]"),
        (dict(maps={"a": maps_of(7), "b": maps_of(7, latents=2)}), ValueError, r"got maps of \[2, 3\]"),
        (dict(maps={}), ValueError, "at least one modality"),
        (dict(maps={"a": maps_of(7)}, data=torch.rand(7, 1)), ValueError, "data as a dict.*got.*data Tensor"),
        (dict(maps={"a": maps_of(7)}, data={"a": torch.rand(8, 1)}), ValueError, r"data of a of shape.*got \(8, 1\)"),
        (dict(maps=maps_of(7), scale="log2"), ValueError, "'linear', 'log', got 'log2'"),
        (dict(maps=maps_of(7), frames=0), ValueError, "at least one of the frames and columns, got 0 and 4"),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        pf.plot_attention_map(**arguments)


def test_without_matplotlib():
    code = """
import sys
sys.modules["matplotlib"] = None
import torch, perceiver_fast as pf
try:
    pf.plot_attention_map(torch.rand(2, 3, 3))
except ImportError as error:
    print(error)
"""
    done = python("-c", code)
    assert "pip install -e '.[demo]'" in done.stdout, done.stderr


def test_importing_the_package_does_not_import_matplotlib():
    code = "import sys, perceiver_fast; print('matplotlib' in sys.modules, 'rich' in sys.modules)"
    done = python("-c", code)
    assert done.stdout.strip() == "False False", done.stderr
