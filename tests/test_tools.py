"""The backend switch, and what importing the package does."""

import os
import subprocess
import sys

import perceiver_fast as pf


def python(code, **env):
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | env, capture_output=True, text=True)
    return done.stdout + done.stderr


def test_use_backend_sets_and_restores():
    pf.use_backend("reference")
    with pf.use_backend("cpu"):
        assert pf.backends.forced_backend() == "cpu"
    assert pf.backends.forced_backend() == "reference"
    show = "import perceiver_fast as pf; print(pf.backends.forced_backend())"
    assert python(show, PERCEIVER_FAST_BACKEND="reference").strip() == "reference"
    assert "expected one of 'auto'" in python(show, PERCEIVER_FAST_BACKEND="fast")


def test_import_neither_compiles_nor_initialises_cuda():
    code = """
import sys, torch, perceiver_fast, perceiver_fast.kernels
print("torch._inductor" in sys.modules, "torch._dynamo" in sys.modules, torch.cuda.is_initialized())
"""
    assert python(code).strip() == "False False False"
