"""Training on real digits from the same initial weights follows perceiver-pytorch's loss curve."""

import pytest
import torch
from support import model_pair

STEPS, BATCH = 200, 64


@pytest.fixture(scope="module")
def digits():
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images / 16, dtype=torch.float32).view(-1, 8, 8, 1), torch.tensor(labels)


def losses(model, images, labels):
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    curve = []
    for _ in range(STEPS):
        batch = torch.randint(len(images), (BATCH,), generator=generator)
        loss = torch.nn.functional.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    return torch.tensor(curve, dtype=torch.float64)


def test_loss_curve_is_theirs(digits):
    torch.use_deterministic_algorithms(False)  # NaN-filling every allocation slows training down
    keywords = dict(
        num_freq_bands=4, depth=2, max_freq=8.0, input_channels=1, num_latents=16, latent_dim=32, latent_heads=2,
        latent_dim_head=16, cross_dim_head=16, num_classes=10,
    )  # fmt: skip
    theirs, ours = model_pair(**keywords)
    start = {name: value.clone() for name, value in theirs.state_dict().items()}
    expected, actual = losses(theirs, *digits), losses(ours, *digits)
    # What float32 noise may do: the same model, its weights off by one part in 10^7, drifts this far from itself.
    theirs.load_state_dict({name: value * (1 + 1e-7) for name, value in start.items()})
    noise = (losses(theirs, *digits) - expected).abs()
    assert expected[-20:].mean() < 0.6 * expected[:20].mean()  # it learns
    assert (actual[:20] - expected[:20]).abs().max() < 1e-5
    assert (actual - expected).abs().max() <= 10 * noise.max() + 1e-4
