"""Launches every Triton kernel of every declared op as a call on a GPU would, without one: ``python tests/fake_driver.py``.

A driver for Triton that finds a GPU, takes what was compiled for it, and runs nothing. All before that is Triton's own
launch: arguments are bound, what is none of a kernel's raises, types and alignments are looked up, and machine code is
made. The interpreter and ahead-of-time compilation do none of this. It has to be a process of its own: a driver is for
good. Written against Triton 3.6 and 3.7.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
from collections import Counter
from collections.abc import Iterator

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from perceiver_fast.gpu import assumed
from perceiver_fast.kernels.launch import Launch
from perceiver_fast.ops.declaration import OPS, Op, Operator, replaced

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
UNSWITCHED = ("grid",)  # it goes with the sizes


class Binaries:
    """Stands in for the C module that loads machine code and asks a GPU what it is; an H100 answers."""

    def __init__(self) -> None:
        self.loaded = 0

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        assert binary
        self.loaded += 1
        return 1, 1, 32, 0, 1024  # module, function, registers, spills, most threads

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "max_num_regs": 65536, "warpSize": 32}


class Launcher:
    """Stands in for the compiled stub that hands a kernel and its arguments to the GPU."""

    def __init__(self, source: object, metadata: object) -> None:
        pass

    def __call__(self, *arguments: object, **options: object) -> None:
        pass


class FakeDriver(DriverBase):
    """One GPU of an architecture, on which nothing runs."""

    launcher_cls = Launcher

    def __init__(self, architecture: int) -> None:
        self.architecture, self.utils = architecture, Binaries()

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_device_capability(self, device: int | None = None) -> tuple[int, int]:
        return divmod(self.architecture, 10)

    def get_benchmarker(self) -> None:
        raise NotImplementedError

    def get_empty_cache_for_benchmark(self) -> None:
        raise NotImplementedError

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind


def cases(op: Op) -> Iterator[dict[str, object]]:
    """Options of an op's sample: those declared that GPUs take, in every dtype that they take, each switch on and off."""
    known, seen = inspect.signature(op.sample).parameters, []
    typed = [name for name, parameter in known.items() if isinstance(parameter.default, torch.dtype)]
    narrowed = ["half"] if "half" in known else typed
    switches = [name for name, parameter in known.items() if type(parameter.default) is bool and name not in UNSWITCHED]
    for declared in (*op.variants, *op.instances.values()):
        if torch.float64 in declared.values():
            continue  # PyTorch's, on GPUs
        switched = [{**declared, name: not declared.get(name, known[name].default)} for name in switches]
        there = [name for name in narrowed if declared.get(name, True) is not None]
        narrow = [{**case, **dict.fromkeys(there, dtype)} for case in (declared, *switched) for dtype in DTYPES]
        for case in (declared, *narrow):
            if case not in seen:
                seen.append(case)
                yield case


class Report:
    """What was launched, and what Triton raised."""

    def __init__(self, every: bool, spoilt: str) -> None:
        self.every, self.spoilt = every, spoilt
        self.launches: Counter[str] = Counter()
        self.compiled: set = set()
        self.raised: dict[str, str] = {}
        self.case, self.cases = "", 0

    def take(self, launch: Launch, run) -> None:
        """Launch it; but without ``every`` one of a kernel, its switches and widths of numbers: compiling takes long."""
        name = launch.kernel.__name__
        if name == self.spoilt:
            launch = dataclasses.replace(launch, arguments=launch.arguments | {"unknown": 1})
        values = launch.arguments.values()
        switches = tuple(value for value in values if type(value) in (bool, str))
        widths = frozenset(t.dtype.itemsize for t in values if torch.is_tensor(t) and t.dtype in DTYPES)
        key = name, switches, widths
        try:
            inspect.signature(launch.kernel.fn).bind(**launch.arguments)
            if self.every or key not in self.compiled:
                run(launch)
            self.compiled.add(key)
            self.launches[name] += 1
        except Exception as error:
            self.raised.setdefault(f"{name}: {type(error).__name__}: {str(error)[:300]}", self.case)


def launch_all(report: Report, names: list[str]) -> None:
    """Run all cases of these ops on tensors without content, forward and backward."""
    run = Launch.run
    Launch.run = lambda launch: report.take(launch, run)

    def kernel(operator: Operator, arguments: tuple) -> object:
        return operator.triton_kernel()(*arguments)

    try:
        for name in names:
            for case in cases(OPS[name]):
                report.case = f"{name} {case}"
                report.cases += 1
                with replaced(kernel):
                    OPS[name].run_sample("meta", **case)
    finally:
        Launch.run = run


def main() -> None:
    """Prints what was found as JSON; the exit code is 1 where anything raised."""
    triton_ops = [name for name, op in OPS.items() if any(operator.triton for operator in op.operators)]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", action="append", choices=triton_ops, help="only this one (again: and this one)")
    parser.add_argument("--architecture", type=int, default=90)
    parser.add_argument("--all", action="store_true", help="compile every variant: minutes")
    parser.add_argument("--spoil", default="", metavar="KERNEL", help="pass it an argument that it does not take")
    args = parser.parse_args()
    driver = FakeDriver(args.architecture)
    triton.runtime.driver.set_active(driver)
    report = Report(args.all, args.spoil)
    with assumed(args.architecture):
        launch_all(report, args.op or triton_ops)
    found = dict(triton=triton.__version__, ops=args.op or triton_ops, launches=report.launches)
    found |= dict(cases=report.cases, compiled=driver.utils.loaded, raised=report.raised)
    print(json.dumps(found, indent=1))
    raise SystemExit(bool(report.raised))


if __name__ == "__main__":
    main()
