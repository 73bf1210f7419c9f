"""Audio: which waveform is it? Raw sound, one token a sample, 4,096 on a single axis.

Pitch, phase and loudness are random, so no sample by itself says much: latents have to gather the shape of the wave
from all of them. Draws some waveforms and where two latents listen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from common import console, new_figure, parse, predict, report, save, train
from torch import Tensor

import perceiver_fast as pf

SAMPLES = 4096
LOUDNESS = 3.0  # one channel beside 25 of position: tokens should differ by what is heard, not only by when
MODEL = dict(
    num_freq_bands=12, max_freq=48.0, depth=2, input_channels=1, input_axis=1, num_latents=16, latent_dim=48,
    cross_dim_head=32, latent_heads=4, latent_dim_head=12,
)  # fmt: skip
NAMES = ("sine", "square", "saw", "noise", "fading", "chirp")


def draw(batch: int) -> tuple[tuple, Tensor]:
    """Sounds ``[B, 4096, 1]`` and which waveform ``[B]``."""
    labels = torch.randint(len(NAMES), (batch,))
    time = torch.linspace(0, 1, SAMPLES)
    cycles, start = 8 + 12 * torch.rand(batch, 1), torch.rand(batch, 1)
    phase = start + cycles * time
    sine = (2 * math.pi * phase).sin()
    chirp = (2 * math.pi * (start + cycles * (0.1 * time + 2 * time.square()))).sin()
    every = (sine, sine.sign(), 2 * phase.frac() - 1, torch.randn(batch, SAMPLES), sine * (-4 * time).exp(), chirp)
    waves = torch.stack(every)[labels, torch.arange(batch)]
    waves = waves / waves.square().mean(1, keepdim=True).sqrt()  # loudness tells nothing
    waves = waves + 0.05 * torch.randn(batch, SAMPLES)
    return (LOUDNESS * waves.unsqueeze(-1),), labels


def picture(model: pf.Perceiver, shown: Sequence[str] = ("sine", "square", "fading", "chirp")):
    """Waves of some kinds, and where the two latents of the most contrast listen."""
    (waves,), labels = draw(64)
    latents = pf.contrasting_latents(model, waves, layer=1, count=2)
    figure = new_figure(11, 2.3 * len(shown))
    for row, name in zip(figure.subfigures(len(shown), 1), shown):
        wave = waves[labels == NAMES.index(name)][:1]
        maps = pf.attention_map(model, wave, layer=1, latents=latents, heads="mean")
        pf.plot_attention_map(maps[0], wave[0], latents=latents, title=name, figure=row)
    return figure


def main() -> None:
    args = parse(__doc__)
    model = pf.Perceiver(**MODEL, num_classes=len(NAMES))
    console.print(str(pf.explain(model, draw(1)[0][0])), markup=False)
    train(model, draw, steps=80 if args.quick else 500, batch=16, rate=5e-3)
    predicted, true = predict(model, draw, 96 if args.quick else 600, batch=32)
    report(predicted, true, NAMES, "new sounds")
    save(picture(model), args.out / "attention-audio.png")


if __name__ == "__main__":
    main()
