"""Threads that share a processor: how many there are processors for, and that results are the same to the bit."""

import os
import subprocess
import sys

import pytest
from support import needs_extension

from perceiver_fast import extension

pytestmark = [
    pytest.mark.skipif(**needs_extension),
    pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system does not tell a thread's processors"),
]

PROGRAM = """
import os, sys, torch
import perceiver_fast as pf
from perceiver_fast import extension

torch.set_num_threads(2)
if "from the start" in sys.argv:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
torch.manual_seed(0)
model = pf.Perceiver(num_freq_bands=4, depth=1, max_freq=8.0, num_latents=96, latent_dim=64, num_classes=5)
image = torch.rand(2, 48, 40, 3)

def numbers():
    model.zero_grad()
    out = model(image)
    out.square().sum().backward()
    return [out.detach(), *(p.grad for p in model.parameters())]

before = numbers()
if "from then on" in sys.argv:
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), {min(os.sched_getaffinity(0))})
    import time
    time.sleep(0.05)
after = numbers()
assert all(map(torch.equal, before, after))
print(extension.module.team_cores(), *(float(t.double().sum()).hex() for t in after))
"""


def run(*arguments, **environment):
    """How many processors two threads have, and the sums of a model's numbers."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OMP", "GOMP", "KMP"))}
    # Which library has the products would be measured, and may turn out either way.
    command, env = [sys.executable, "-c", PROGRAM, *arguments], clean | environment | {"PERCEIVER_FAST_LINEAR": "torch"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    cores, *numbers = done.stdout.split()
    return int(cores), numbers


needs_two = pytest.mark.skipif(
    len(getattr(os, "sched_getaffinity", lambda _: ())(0)) < 2, reason="this process may use one processor alone"
)


@needs_two
def test_threads_that_share_a_processor():
    cores, numbers = run()
    assert cores == 2
    assert run("from the start") == (1, numbers)
    assert run("from then on") == (1, numbers)


@needs_two
def test_threads_that_are_bound_to_a_processor_each():
    assert run(OMP_PROC_BIND="true")[0] == 2


def test_info_tells():
    from perceiver_fast.commands.info import _threads

    assert _threads(2, None) == _threads(2, 2) == "2"
    assert _threads(2, 1) == "2, which share one core: torch.set_num_threads(1) is faster"
    assert "share 3 cores" in _threads(8, 3)
    assert extension.module.team_cores() >= 1
