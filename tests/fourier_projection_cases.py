"""Odd shapes of fourier_projection, and random inputs for them."""

import torch


def case(batch, coord_batch, tokens, features, axes, bands, columns, with_bias):
    generator = torch.Generator().manual_seed(tokens + columns)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    channels = features + axes * (2 * bands + 1)
    coords = draw(coord_batch, tokens, axes).clamp(-1, 1)
    frequencies = draw(axes, bands).abs() * 20
    feat = draw(batch, tokens, features) + 3 if features else None
    weight = draw(channels, columns)
    weight -= weight.mean(0)
    bias = draw(columns) if with_bias else None
    return feat, coords, frequencies, weight, bias, draw(batch, tokens, columns)


CASES = {  # batch, batch of coords, tokens, features, axes, bands, columns, bias
    "odd": (2, 2, 37, 3, 2, 5, 21, True),
    "shared positions": (3, 1, 45, 2, 3, 3, 20, False),
    "no features": (1, 1, 131, 0, 2, 6, 67, True),
    "no bands": (2, 1, 9, 4, 3, 0, 5, True),
    "one channel": (1, 1, 5, 0, 1, 0, 1, False),
    "wide": (1, 1, 70, 40, 2, 33, 130, True),
    "many axes": (2, 2, 33, 1, 9, 4, 8, False),
    "many tokens": (2, 1, 600, 3, 1, 2, 3, True),
}
