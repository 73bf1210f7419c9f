"""Memory grows with the input, never with latents times tokens: measured in fresh processes."""

import subprocess
import sys

import pytest
from support import needs_extension

pytestmark = [
    pytest.mark.skipif(**needs_extension),
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]

MEASURE = """
import sys, torch, perceiver_fast as pf
def resident(field):
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(field + ":")) / 1024
sizes, train = eval(sys.argv[1]), sys.argv[2] == "train"
model = pf.Perceiver(num_freq_bands=64, max_freq=224, depth=1, num_latents=512, latent_dim=64,
                     self_per_cross_attn=0, num_classes=10, input_axis=len(sizes))
with torch.set_grad_enabled(train):
    model(torch.randn(1, *[4] * len(sizes), 3))  # libraries, thread pools
    data = torch.randn(1, *sizes, 3)
    open("/proc/self/clear_refs", "w").write("5")
    before = resident("VmRSS")
    out = model(data)
    if train:
        out.sum().backward()
assert out.isfinite().all()
print(resident("VmHWM") - before, resident("VmHWM"))
"""


def megabytes(sizes, mode):
    command = [sys.executable, "-c", MEASURE, repr(sizes), mode]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return [float(number) for number in done.stdout.split()]


def test_video_adds_little():
    added, _ = megabytes((16, 224, 224), "infer")
    assert added < 250  # perceiver-pytorch holds two 512 x 802,816 float32 arrays at once: 3.3 GB


def test_sixteen_million_tokens_forward_and_backward():
    _, peak = megabytes((4096, 4096), "train")
    assert peak < 3000
