"""Every Triton kernel passes through Triton's own launch, up to the GPU: tests/fake_driver.py in processes of its own.

All variants are bound to the kernels' arguments, one of every kernel, switch and width of numbers is launched.
PERCEIVER_FAST_TEST_ALL_KERNELS=1 launches all; so does ``python tests/fake_driver.py --all``.
"""

import importlib.util
import json
import os
from pathlib import Path

import pytest
from warm_python import python

from perceiver_fast.ops.declaration import OPERATORS, OPS

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: its kernels were NOT launched"
)
ROOT = Path(__file__).resolve().parents[1]
ALL = ["--all"] if os.environ.get("PERCEIVER_FAST_TEST_ALL_KERNELS") == "1" else []


def launched(*arguments, script="fake_driver.py"):
    """Exit code and report of a run; the interpreter, which has no such launch, is off."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    done = python(f"tests/{script}", *arguments, cwd=ROOT, env=environment)
    assert done.stdout, done.stderr[-6000:]
    return done.returncode, json.loads(done.stdout)


def test_every_kernel_is_launched(capsys):
    code, found = launched(*ALL)
    assert code == 0 and not found["raised"], found["raised"]
    assert set(found["ops"]) == {name for name, op in OPS.items() if op.instances}
    assert found["launches"].keys() >= {"grid_attention_backward_merge_kernel", "cross_attention_dkv_kernel"}
    assert sum(found["launches"].values()) > 10 * len(OPERATORS) and found["compiled"] > len(found["launches"])
    with capsys.disabled():
        print(f"\n  Triton {found['triton']}: {len(found['launches'])} kernels in {found['cases']} calls", end="")


def test_an_argument_that_a_kernel_does_not_take_is_found():
    """What once would have failed every backward of grid attention on a GPU."""
    merge = "grid_attention_backward_merge_kernel"
    code, found = launched("--op", "grid_attention", "--spoil", merge)
    assert code == 1 and found["raised"]
    assert all(error.startswith(f"{merge}: ") and "unknown" in error for error in found["raised"])


def test_no_trial_holds_where_nothing_runs():
    """First uses (perceiver_fast/ops/trial.py) meet kernels that write nothing, and one that Triton refuses to launch."""
    code, found = launched("--op", "geglu", script="fake_trials.py")
    assert code == 0 and found["geglu"]["lasting"] and found["geglu"]["error"].endswith("is off by nan")
    code, found = launched("--op", "grid_attention", "--spoil", "grid_planes_kernel", script="fake_trials.py")
    assert code == 0 and "unknown" in found["grid_attention"]["error"] and not found["grid_attention"]["lasting"]
