"""The CUDA kernels of grid attention on the host, in the place of the CUDA library's operators for CPU tensors."""

import ctypes
import math
import re
import shutil
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
POINTERS, STRIDES = ("q", "feat", "scale", "mask"), ("q_batch", "q_row")
COUNTS = ("batch", "queries", "rows", "columns", "padded", "splits", "per_split")


class Call(ctypes.Structure):
    _fields_ = [("q", ctypes.c_void_p), *((name, ctypes.c_int64) for name in STRIDES)]
    _fields_ += [(name, ctypes.c_void_p) for name in POINTERS[1:]] + [(name, ctypes.c_int32) for name in COUNTS]


def compiler():
    return shutil.which("g++") or shutil.which("clang++")


def build(folder):
    """The library, compiled for the host."""
    library = folder / "grid_attention.so"
    flags = ["-std=c++17", "-O2", "-fPIC", "-shared", "-Wall", "-Wno-unknown-pragmas"]
    command = [compiler(), *flags, ROOT / "tests" / "cuda" / "grid_attention.cpp", "-o", library]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return ctypes.CDLL(str(library))


def address(t):
    return None if t is None else ctypes.c_void_p(t.data_ptr())


def described(q, feat, scale, mask, padded, splits, per_split):
    sizes = q.shape[0], q.shape[1], feat.shape[1], feat.shape[2], padded, splits, per_split
    pointers = (t if t is None else t.data_ptr() for t in (feat, scale, mask))
    return Call(q.data_ptr(), q.stride(0), q.stride(1), *pointers, *sizes)


def both_ways(run, outputs):
    """Threads run upwards and downwards between two barriers: results are the same bits where no barrier lacks."""
    found = []
    for downwards in (0, 1):
        for t in outputs:
            t.fill_(math.nan)
        run(downwards)
        found.append([t.clone() for t in outputs])
    assert all(torch.equal(*(t.nan_to_num(nan=-7.0) for t in pair)) for pair in zip(*found))


def operators(library):
    """The CUDA library's operators by schema, as it defines them, with functions that emulate them."""

    def sums(q, feat, scale, mask, column_parts, row_parts, sum_parts, splits, per_split):
        call = described(q, feat, scale, mask, column_parts.shape[-1], splits, per_split)
        outputs = column_parts, row_parts, sum_parts
        of = ctypes.byref(call), feat.shape[-1], feat.dtype == torch.float16
        both_ways(lambda down: library.forward(*of, down, *map(address, outputs)), outputs)

    def gradient_sums(q, feat, scale, mask, d_o, stats, column_parts, row_parts, sum_parts, splits, per_split):
        call = described(q, feat, scale, mask, column_parts.shape[-1], splits, per_split)
        given, outputs = map(address, (d_o, stats)), (column_parts, row_parts, sum_parts)
        given = [*given, *map(address, outputs)]
        of = ctypes.byref(call), feat.shape[-1], feat.dtype == torch.float16
        both_ways(lambda down: library.backward(*of, down, *given), outputs)

    source = (ROOT / "csrc" / "cuda" / "grid_attention.cu").read_text()
    schemas = ["".join(re.findall(r'"([^"]*)"', part)) for part in re.findall(r"m\.def\((.*?)\);", source, re.DOTALL)]
    functions = dict(grid_attention_sums=sums, grid_attention_gradient_sums=gradient_sums)
    return {schema: functions[schema.partition("(")[0]] for schema in schemas}
