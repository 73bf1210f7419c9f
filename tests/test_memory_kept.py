"""What freed memory is kept, and that a process without room for it loses nothing else."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest
from support import needs_extension
from warm_python import python

import perceiver_fast

PACKAGE = Path(perceiver_fast.__file__).parent

pytestmark = pytest.mark.skipif(**needs_extension)

# Pages that the system clears for four blocks of 8 MB, taken and given back five times.
FAULTS = """
import ctypes, resource, runpy
libc = ctypes.CDLL("libc.so.6")
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        blocks = [libc.malloc(8 << 20) for _ in range(4)]
        for block in blocks:
            ctypes.memset(block, 1, 8 << 20)
        for block in blocks:
            libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
before = faults()
runpy.run_path(MEMORY)["keep_freed"]()
faults()
print(before, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc that keeps it")
def test_freed_memory_is_found_again():
    # The file by itself, since importing the package keeps memory already; in a new process, as a warm one has imported it.
    command = [sys.executable, "-c", f"MEMORY = {str(PACKAGE / 'memory.py')!r}" + FAULTS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    before, after = map(int, done.stdout.split())
    assert after < before / 10, (before, after)


def test_without_room_for_it_the_kernels_load_all_the_same():
    code = """
from perceiver_fast import extension, memory
memory.LARGEST = 2**60
memory.keep_freed()
print(extension.error)
"""
    done = python("-c", code)
    assert done.stdout.strip() == "None", done.stderr
