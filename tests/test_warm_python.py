"""The processes that tests fork: they end as others do, and what cannot begin is an error at once."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from warm_python import FORKS, python, start

pytestmark = pytest.mark.skipif(not FORKS, reason="only Linux forks them; elsewhere they are ordinary processes")


def test_output_status_and_environment():
    code = "import sys, os; print(os.environ['GIVEN'], 'torch' in sys.modules); sys.exit(3)"
    done = python("-c", code, env=os.environ | {"GIVEN": "so"})
    assert (done.returncode, done.stdout, done.stderr) == (3, "so True\n", "")


def test_a_process_that_cannot_begin():
    with pytest.raises(RuntimeError, match="no_such_module"):
        python("-c", "pass", imports=("no_such_module",))
    with pytest.raises(RuntimeError, match="no process began: .*No such file"):
        start([sys.executable, "-c", "pass"], stdout=0x7FFFFFF)


def test_nobody_reads_what_is_asked_of_others():
    code = "import sys; print(repr(sys.stdin.read()))"
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: python("-c", code, imports=("json",)).stdout, range(8)))
    assert found == ["''\n"] * 8


def test_what_only_a_start_reads_gets_an_ordinary_process():
    command = [sys.executable, "-c", "pass"]
    process = start(command, env=os.environ | {"MALLOC_TRIM_THRESHOLD_": "100000"})
    assert isinstance(process, subprocess.Popen) and process.wait() == 0
