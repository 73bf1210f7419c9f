"""Memory grows with the input, never with latents times tokens: measured in fresh processes."""

import sys

import pytest
from support import megabytes, needs_extension

pytestmark = [
    pytest.mark.skipif(**needs_extension),
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]

PREPARE = """
sizes = {sizes}
torch.set_grad_enabled({train})
model = pf.Perceiver(num_freq_bands=64, max_freq=224, depth=1, num_latents={latents}, latent_dim=64,
                     self_per_cross_attn=0, num_classes=10, input_axis=len(sizes))
model(torch.randn(1, *[4] * len(sizes), 3))  # libraries, thread pools
data = torch.randn(1, *sizes, 3)
"""
RUN = """
out = model(data)
if out.requires_grad:
    out.sum().backward()
"""


def test_video_adds_little():
    added, _ = megabytes(PREPARE.format(sizes=(16, 224, 224), latents=512, train=False), RUN)
    assert added < 250  # perceiver-pytorch holds two 512 x 802,816 float32 arrays at once: 3.3 GB


def test_sixteen_million_tokens_forward_and_backward():
    _, peak = megabytes(PREPARE.format(sizes=(4096, 4096), latents=64, train=True), RUN)
    assert peak < 3000  # one 64 x 16,777,216 float32 array is 4.3 GB


DECODER = """
torch.set_grad_enabled(False)
model = pf.PerceiverIO(depth=1, dim=16, queries_dim=64, logits_dim=10, num_latents=512, latent_dim=64, decoder_ff=True)
data = torch.randn(1, 1000, 16)
model(data, queries=torch.randn(10, 64))
queries = torch.randn(200_000, 64)
"""


def test_decoder_of_many_queries_adds_little():
    added, _ = megabytes(DECODER, "out = model(data, queries=queries)")
    assert added < 150  # perceiver-pytorch holds two 512 x 200,000 float32 arrays at once: 0.8 GB
