"""The backend switch, and what importing the package does."""

import os

from warm_python import python

import perceiver_fast as pf


def said(code, **env):
    done = python("-c", code, env=os.environ | env)
    return done.stdout + done.stderr


def test_use_backend_sets_and_restores():
    pf.use_backend("reference")
    with pf.use_backend("cpu"):
        assert pf.backends.forced_backend() == "cpu"
    assert pf.backends.forced_backend() == "reference"
    show = "import perceiver_fast as pf; print(pf.backends.forced_backend())"
    assert said(show, PERCEIVER_FAST_BACKEND="reference").strip() == "reference"
    assert "expected one of 'auto'" in said(show, PERCEIVER_FAST_BACKEND="fast")


def test_import_neither_compiles_nor_initialises_cuda():
    code = """
import sys, torch, perceiver_fast, perceiver_fast.kernels
print("torch._inductor" in sys.modules, "torch._dynamo" in sys.modules, torch.cuda.is_initialized())
"""
    assert said(code).strip() == "False False False"
