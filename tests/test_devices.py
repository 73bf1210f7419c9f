"""Every model on a device without float64, as Apple's MPS is one: forward and backward, beside the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from device_cases import CASES

TESTS = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What tests/device_cases.py prints."""
    folder = tmp_path_factory.mktemp("device")
    path = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, TESTS / "device_cases.py", TESTS / "device_without_float64.cpp", folder]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_the_device_refuses_float64(found):
    assert found["float64"] == "this device has no float64"


@pytest.mark.parametrize("name", CASES)
def test_a_model_is_the_cpus(name, found):
    assert not isinstance(found[name], str), found[name][:2000]
    output, gradients = found[name]
    assert output < 2e-6 and gradients < 2e-6
