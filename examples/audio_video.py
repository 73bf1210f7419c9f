"""Audio and video into one Perceiver: the answer needs both, and either may be missing.

A digit moves up or down, while a pitch rises or falls: four classes. Training begins with pictures alone, and later
leaves one of the two out now and then, so that the model also does what it can with the other alone. Draws where three
latents look and listen.
"""

from __future__ import annotations

import math

import torch
from common import accuracy, console, parse, predict, report, save, train
from torch import Tensor
from video import clips, digits

import perceiver_fast as pf

HERTZ, SAMPLES, GROUP = 16_000, 19_200, 16  # as in the paper a token of sound is a group of samples: 1,200 of 16
CONTRAST = 3.0  # one channel of a pixel beside many of position
MODALITIES = (
    pf.Modality("video", input_channels=1, input_axis=3, num_freq_bands=4, max_freq=8.0),
    pf.Modality("audio", input_channels=GROUP, input_axis=1, num_freq_bands=4, max_freq=8.0),
)
MODEL = dict(
    depth=2, num_latents=32, latent_dim=48, cross_dim_head=32, latent_heads=4, latent_dim_head=12, modality_channels=4
)
NAMES = ("up, rises", "up, falls", "down, rises", "down, falls")


def sounds(labels: Tensor) -> Tensor:
    """Sounds ``[B, 1200, 16]`` whose pitch rises (label 0) from about 600 Hz to about 2,200 Hz, or falls (1)."""
    batch = len(labels)
    time = torch.linspace(0, 1, SAMPLES)
    low, high = 400 + 400 * torch.rand(batch, 1), 1600 + 1200 * torch.rand(batch, 1)
    cycles = SAMPLES / HERTZ * (low * time + (high - low) * time.square() / 2)
    waves = (2 * math.pi * (torch.rand(batch, 1) + cycles)).sin()
    waves = torch.where(labels.unsqueeze(1) == 0, waves, waves.flip(1))
    return (waves + 0.1 * torch.randn_like(waves)).unflatten(1, (-1, GROUP))


def draw(batch: int, images: Tensor, missing: str | None = None) -> tuple[tuple, Tensor]:
    """A dict of clips ``[B, 8, 16, 16, 1]`` and sounds ``[B, 1200, 16]``, without what is missing; classes ``[B]``."""
    labels = torch.randint(len(NAMES), (batch,))
    data = {"video": CONTRAST * clips(images, labels // 2), "audio": sounds(labels % 2)}
    data.pop(missing, None)
    return (data,), labels


def shares(model: pf.MultimodalPerceiver, data: dict[str, Tensor]) -> Tensor:
    """Which share of its attention every latent of every block has on the video, ``[blocks, N]``."""
    latents = range(MODEL["num_latents"])
    maps = [pf.attention_map(model, data, block, latents, heads="mean")["video"] for block in range(MODEL["depth"])]
    return torch.stack([of_block.flatten(2).sum(-1).mean(0) for of_block in maps])


def picture(model: pf.MultimodalPerceiver, images: Tensor):
    """Three latents of the first block: the one that attends to the video most, one between, and least."""
    ((data,), labels) = draw(64, images)
    order = shares(model, data)[0].argsort(descending=True).tolist()
    latents = [order[0], order[len(order) // 2], order[-1]]
    maps = pf.attention_map(model, data, latents=latents, heads="mean")
    first = ({name: part[0] for name, part in parts.items()} for parts in (maps, data))
    return pf.plot_attention_map(*first, latents=latents, scale="log", title=NAMES[labels[0]])


def main() -> None:
    args = parse(__doc__)
    images = digits()
    images, unseen = images[:1400], images[1400:]
    model = pf.MultimodalPerceiver(MODALITIES, num_classes=len(NAMES), **MODEL)
    console.print(str(pf.explain(model, draw(1, images)[0][0])), markup=False)

    steps = 200 if args.quick else 700
    drawn = 0

    def draw_training(batch: int) -> tuple[tuple, Tensor]:
        nonlocal drawn
        drawn += 1
        if drawn <= steps * 0.5:  # the picture is the harder part, and not learned beside a sound that is
            return draw(batch, images, missing="audio")
        missing = [None, "video", "audio"][int(torch.tensor([0.6, 0.2, 0.2]).multinomial(1))]
        return draw(batch, images, missing)

    train(model, draw_training, steps, batch=16)
    count = 96 if args.quick else 480
    predicted, true = predict(model, lambda n: draw(n, unseen), count, batch=32)
    report(predicted, true, NAMES)
    for missing, other in (("audio", "video"), ("video", "audio")):
        predicted, true = predict(model, lambda n: draw(n, unseen, missing), count, batch=32)
        accuracy(predicted, true, len(NAMES), f"{other} alone, which can tell two classes from the other two")
    ((data,), _) = draw(64, unseen)
    for block, share in enumerate(shares(model, data).mean(1).tolist()):
        console.print(
            f"block {block}: {share:.0%} of all latents' attention on the video, {1 - share:.0%} on the sound"
        )
    save(picture(model, unseen), args.out / "attention-multimodal.png")


if __name__ == "__main__":
    main()
