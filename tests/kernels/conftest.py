"""The Triton kernels themselves: on a GPU where there is one, else in Triton's interpreter (tests/test_kernels.py).

The interpreter multiplies the bit patterns of bfloat16 operands, cuts off where it converts to bfloat16, and ignores
``input_precision``; here it rounds to bfloat16, and cuts off what tensor cores ignore of TF32 operands, as GPUs do. How
tensor cores round as they add is not emulated.
"""

import os
import random

import numpy as np
import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HALF = torch.bfloat16, torch.float16
if not INTERPRETED and not torch.cuda.is_available():
    collect_ignore_glob = ["test_*.py"]  # tests/test_kernels.py runs them in the interpreter

if INTERPRETED:
    import triton.language as tl
    from triton.runtime import interpreter

    def _rounded(x, bits):
        """float32 rounded to nearest, ``bits`` of its significand's 23 dropped."""
        half = np.uint32(1 << (bits - 1))
        return ((x.view(np.uint32) + half) & np.uint32((0xFFFFFFFF << bits) & 0xFFFFFFFF)).view(np.float32)

    def _pieces(x, bits, count):
        parts = []
        for _ in range(count):
            parts.append(_rounded(x, bits))
            x = x - parts[-1]
        return parts

    def _product(x, y, dtype):
        """x @ y summed over k in order: transposed operands give the same bits, which BLAS libraries do not promise."""
        x, y = x.astype(dtype, copy=False), y.astype(dtype, copy=False)
        total = np.zeros((*x.shape[:-1], y.shape[-1]), dtype)
        for k in range(x.shape[-1]):
            total += x[..., :, k, None] * y[..., k, None, :]
        return total

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        values = []
        for t in (a, b):
            data = np.ascontiguousarray(t.data)
            if t.dtype.scalar == tl.bfloat16:
                data = (data.astype(np.uint32) << 16).view(np.float32)
            values.append(data)
        x, y = values
        if x.dtype == np.float32 and a.dtype.scalar == tl.float32:
            name = str(input_precision).split(".")[-1].lower()
            if name == "tf32":  # the compiler rounds nothing, and the last 13 bits are not looked at
                x, y = ((t.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32) for t in (x, y))
            bits, count = {"tf32x3": (13, 2), "bf16x3": (16, 2), "bf16x6": (16, 3)}.get(name, (0, 0))
            if count:
                xs, ys = _pieces(x, bits, count), _pieces(y, bits, count)
                pairs = [(i, j) for i in range(count) for j in range(count) if i + j < count]
                total = sum(_product(xs[i], ys[j], np.float32) for i, j in pairs)
                return interpreter.TensorHandle(total + d.data, d.dtype.scalar)
        return interpreter.TensorHandle(_product(x, y, d.data.dtype) + d.data, d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = create_dot
    convert = interpreter.InterpreterBuilder.cast_impl

    def cast_impl(self, src, dst_type):
        if src.dtype.scalar != tl.float32 or dst_type.scalar != tl.bfloat16:
            return convert(self, src, dst_type)
        bits = np.ascontiguousarray(src.data).view(np.uint32)
        nearest = (bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16  # ties to even
        rounded = np.where(np.isnan(src.data), bits >> 16, nearest).astype(np.uint16)
        return interpreter.TensorHandle(rounded, dst_type.scalar)

    interpreter.InterpreterBuilder.cast_impl = cast_impl

    @pytest.hookimpl(trylast=True)  # after -k has left out what it does
    def pytest_collection_modifyitems(config, items):
        """Of a case in bfloat16 and in float16, alike but for conversions, one is interpreted, drawn by its name.

        Of the CUDA kernels, which are other templates for either, both are. PERCEIVER_FAST_TEST_ALL_KERNELS=1 interprets
        both of all.
        """
        if os.environ.get("PERCEIVER_FAST_TEST_ALL_KERNELS") == "1":
            return
        cases = {}
        for item in items:
            params = item.callspec.params if hasattr(item, "callspec") else {}
            halves = [value for value in params.values() if value in HALF]
            if halves and not item.path.stem.endswith("_cuda"):
                others = repr([(name, value) for name, value in params.items() if value not in HALF])
                cases.setdefault(f"{item.path.name} {item.originalname} {others}", {})[halves[0]] = item
        left_out = [case[random.Random(name).choice(HALF)] for name, case in cases.items() if len(case) == 2]
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)

    @pytest.fixture(autouse=True)
    def launches_fit(monkeypatch):
        """The interpreter ignores arguments that a kernel does not take; a launch on a GPU raises."""
        from perceiver_fast.kernels.launch import Launch

        run = Launch.run

        def checked(launch):
            assert not launch.mismatches()
            run(launch)

        monkeypatch.setattr(Launch, "run", checked)


@pytest.fixture(scope="session")
def device():
    return torch.device("cpu" if INTERPRETED else "cuda")
