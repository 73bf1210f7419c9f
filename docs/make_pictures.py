"""``python docs/make_pictures.py``: the pictures of how-it-works.md and decoders.md, from the package's own codes, tables
and counts."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # this checkout's package, and the module beside this one

import counts
import torch
from torch import nn

from perceiver_fast import Perceiver, PerceiverIO, grid_tokens
from perceiver_fast.layers import axis_codes
from perceiver_fast.layers.cross_attention import FusedCrossAttention
from perceiver_fast.layers.decoding import FusedDecoder

DENSE, FAST = "#c1553b", "#2b6c8f"  # apart for the colour-blind, too


def picture_of_a_token(plt):
    """One token of a 5 x 9 grid as a matrix of codes times a vector of F + A nonzeros."""
    rows, columns, bands, at = 5, 9, 2, (3, 6)
    raw = torch.tensor([0.9, 0.4, -0.6])
    codes = [axis_codes(n, bands, 3.0, torch.float32, torch.device("cpu")).code for n in (rows, columns)]
    matrix = torch.block_diag(torch.eye(3), *(code.T for code in codes))
    sparse = torch.zeros(3 + rows + columns)
    sparse[:3], sparse[3 + at[0]], sparse[3 + rows + at[1]] = raw, 1.0, 1.0
    token = matrix @ sparse
    assert torch.equal(token, torch.cat([raw, codes[0][at[0]], codes[1][at[1]]]))

    channels, entries = matrix.shape
    top = (entries - channels) / 2  # the vector is the highest of the three
    figure, axis = plt.subplots(figsize=(9, 6.2), constrained_layout=True)
    for values, left, above, title in (
        (token[:, None], 0, top, f"token z:\n{channels} numbers"),
        (
            matrix,
            3,
            top,
            "what the model knows without the input:\nthe raw channels' places, and the codes of every axis",
        ),
        (sparse[:, None], entries + 5, 0, "5 nonzeros"),
    ):
        height, width = values.shape
        x, y = torch.arange(width + 1) + left, torch.arange(height + 1) + above
        axis.pcolormesh(x, y, values, cmap="RdBu_r", vmin=-1, vmax=1, edgecolors="0.85", linewidth=0.5)
        axis.text(left + width / 2, above - 0.3, title, ha="center", va="bottom")
    for entry in torch.nonzero(sparse).flatten().tolist():
        for corner, size in (((3 + entry, top), (1, channels)), ((entries + 5, entry), (1, 1))):
            axis.add_patch(plt.Rectangle(corner, *size, fill=False, edgecolor="black", linewidth=1.6))
    spans = {"x": (0, 3), f"row i = {at[0]}": (3, 3 + rows), f"column j = {at[1]}": (3 + rows, entries)}
    for name, (start, end) in spans.items():
        axis.text(3 + (start + end) / 2, top + channels + 0.3, name, ha="center", va="top")
    for name, entry in zip(spans, (1.5, 3.5 + at[0], 3.5 + rows + at[1])):
        axis.text(entries + 6.3, entry, name, ha="left", va="center")
    for x, sign in ((2, "="), (entries + 4, "x")):
        axis.text(x, entries / 2, sign, fontsize=16, ha="center", va="center")
    axis.set(xlim=(-1.5, entries + 10), ylim=(entries + 0.3, -1.5), aspect="equal")
    axis.axis("off")
    return figure


def made_up_image(height: int, width: int) -> torch.Tensor:
    """A disc on a gradient, ``[1, height, width, 3]`` in [-1, 1]."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    disc = ((x - 0.3).square() + (y + 0.2).square() < 0.16).float()
    return torch.stack([2 * disc - 1, x, y * (1 - disc) + disc], -1).unsqueeze(0)


def picture_of_logits(plt):
    """One query's logits over an image: colours, plus a strip of rows, plus a strip of columns, times a scale."""
    torch.manual_seed(3)
    model = Perceiver(num_freq_bands=6, max_freq=12.0, depth=1, num_latents=4, latent_dim=32, cross_dim_head=32).eval()
    image = made_up_image(48, 64)
    layer, tokens = model.layers[0].cross_attn, model.describe(image)
    with torch.no_grad():
        x = layer.norm(model.latents.unsqueeze(0)) * 6  # sharper than a model is before training: the picture needs it
        q = FusedCrossAttention(layer).grid_tables(x, tokens)[0][0, 0, 1]
        colour, rows, columns = q.split([3, *tokens.sizes])
        scale = tokens.scale(layer.norm_context.eps)[0]
        colours = image[0] @ colour
        logits = scale * (colours + rows[:, None] + columns[None, :])
        kv = layer.fn.to_kv(layer.norm_context(tokens.materialize()))  # the dense way, which has to give the same
        dense = (layer.fn.to_q(x[0, 1]) @ kv[0, :, :32].T) * 32**-0.5
        difference = logits.flatten() - dense  # the same for all tokens, which a softmax does not notice
    assert (difference - difference.mean()).abs().max() < 1e-5 * logits.abs().max()

    panels = {
        "the image": (image[0] + 1) / 2,
        "q_x . x\n3 numbers of q": colours,
        "q_1[i]\n48 numbers": rows[:, None].expand(-1, 4),
        "q_2[j]\n64 numbers": columns[None, :].expand(4, -1),
        "times r: the scale\nof LayerNorm": scale,
        "softmax: the weights P": logits.flatten().softmax(0).view_as(logits),
    }
    figure, axes = plt.subplots(2, 3, figsize=(9, 4.8), constrained_layout=True)
    most = max(part.abs().max() for part in (colours, rows, columns)).item()
    for axis, (title, values) in zip(axes.flat, panels.items()):
        terms = {"cmap": "RdBu_r", "vmin": -most, "vmax": most} if title.startswith("q_") else {"cmap": "magma"}
        axis.imshow(values, **terms)
        axis.set_title(title, fontsize=10)
        axis.set_xticks([]), axis.set_yticks([])
    return figure


def picture_of_a_decoder(plt):
    """One latent's logits for the queries of a grid: a row of one table, plus a row of the other, times a scale."""
    torch.manual_seed(5)
    rows, columns, heads = 48, 64, 1
    queries = grid_tokens((rows, columns), num_freq_bands=6, max_freq=12.0, embed=nn.Linear(26, 40))
    model = PerceiverIO(depth=0, dim=4, queries_dim=40, num_latents=5, latent_dim=32, cross_heads=heads).eval()
    layer, latents = model.decoder_cross_attn, 6 * torch.randn(1, 5, 32)
    with torch.no_grad():
        layer.fn.to_q.weight.mul_(6)  # sharper than a model is before training: the picture needs it
        given = FusedDecoder(layer, None, latents, "cpu")._arguments(queries.describe(latents))
        table, scale, bias = given["tables"][0, 0], given["scale"][0].view(rows, columns), given["bias"][0, 0]
        of_rows, of_columns = table.split([rows, columns], -1)
        logits = scale * (of_rows[:, :, None] + of_columns[:, None, :]) + bias[:, None, None]
        q = layer.fn.to_q(layer.norm(queries.tensor(latents)))[0]  # the dense way, which has to give the same
        k = layer.fn.to_kv(layer.norm_context(latents)).chunk(2, -1)[0][0]
        dense = (q @ k.T).T.view(-1, rows, columns) * layer.fn.scale
    assert (logits - dense).abs().max() < 1e-4 * dense.abs().max()

    shown = int(logits.softmax(0).flatten(1).var(1).argmax())
    panels = {
        "T_1[n, i]\n48 numbers": of_rows[shown][:, None].expand(-1, 4),
        "T_2[n, j]\n64 numbers": of_columns[shown][None, :].expand(4, -1),
        "times r: the scale\nof LayerNorm": scale,
        "S[., n]: 3,072 logits\nof latent n": logits[shown],
        "its weights,\nof 5 latents": logits.softmax(0)[shown],
    }
    figure, axes = plt.subplots(1, 5, figsize=(11, 2.6), constrained_layout=True)
    most = max(part[shown].abs().max() for part in (of_rows, of_columns)).item()
    for axis, (title, values) in zip(axes, panels.items()):
        terms = {"cmap": "RdBu_r", "vmin": -most, "vmax": most} if title.startswith("T_") else {"cmap": "magma"}
        axis.imshow(values, **terms)
        axis.set_title(title, fontsize=9)
        axis.set_xticks([]), axis.set_yticks([])
    return figure


def picture_of_memory(plt):
    """What exists in memory at the geometry cross-only, in both libraries."""
    rows = counts.memory("cross-only")
    figure, axis = plt.subplots(figsize=(9, 3.4), constrained_layout=True)
    for at, (_, size, fast) in enumerate(rows):
        axis.barh(at, size / 2**20, color=FAST if fast else DENSE)
        axis.text(size / 2**20 + 1, at, f"{size / 2**20:.3g} MiB", va="center", fontsize=9)
    axis.set_yticks(range(len(rows)), [name for name, *_ in rows], fontsize=9)
    axis.invert_yaxis()
    axis.set_xlim(right=115)
    axis.set_xlabel("MiB in float32, counted from shapes: one image of 224 x 224, 512 latents, 64 bands")
    axis.legend(*_colours(plt, "built densely", "perceiver-fast"), loc="lower right")
    return figure


def _colours(plt, *labels: str) -> tuple[list, tuple[str, ...]]:
    return [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in (DENSE, FAST)], labels


def picture_of_work(plt):
    """Counted multiply-adds and bytes of one cross-attention: with tokens built, and on the way taken."""
    rows = counts.work()
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.6), sharey=True, constrained_layout=True)
    for axis, unit, kind in ((axes[0], 1e9, "arithmetic"), (axes[1], 2**20, "bytes")):
        for at, row in enumerate(rows):
            dense, fast = getattr(row.dense, kind), getattr(row.fast, kind)
            axis.plot([fast / unit, dense / unit], [at, at], color="0.8", linewidth=3, zorder=1)
            axis.scatter([dense / unit, fast / unit], [at, at], color=[DENSE, FAST], s=45, zorder=2)
            axis.text(max(dense, fast) / unit * 1.3, at, f"{dense / fast:.3g} x", va="center", fontsize=9)
        axis.set_xscale("log")
        axis.set_xlim(right=axis.get_xlim()[1] * 4)
    axes[0].set_xlabel("G multiply-adds (12 for a pair's exponential and sums)")
    axes[1].set_xlabel("MiB through memory")
    axes[0].set_yticks(range(len(rows)), [f"{row.name}: {row.plan.path}" for row in rows], fontsize=9)
    axes[0].invert_yaxis()
    figure.legend(
        *_colours(plt, "tokens built, then keys and values", "the way taken"), loc="outside upper center", ncols=2
    )
    return figure


PICTURES = {
    "token": picture_of_a_token,
    "logits": picture_of_logits,
    "decoder": picture_of_a_decoder,
    "memory": picture_of_memory,
    "work": picture_of_work,
}


def main(argv: list[str] | None = None) -> int:
    """Draw all pictures; returns 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE / "pictures", help="folder (default: %(default)s)")
    args = parser.parse_args(argv)
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    args.out.mkdir(parents=True, exist_ok=True)
    # The same file from the same code: no date, and names of elements from a salt.
    with plt.rc_context({"svg.hashsalt": "perceiver-fast", "font.size": 10, "axes.spines.top": False}):
        for name, draw in PICTURES.items():
            figure = draw(plt)
            figure.savefig(args.out / f"{name}.svg", facecolor="white", metadata={"Date": None})
            plt.close(figure)
            print(args.out / f"{name}.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
