"""A process that measures: a kernel that hangs, crashes or loses the device takes one case with it, not the battery."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

from benchmarks.gpu.cases import Case
from benchmarks.process import Ended, Process

START_SECONDS = 180  # importing torch and starting CUDA on a machine that does so for the first time
STOP_SECONDS = 5


class WorkerLost(RuntimeError):
    """The process ended or was ended; ``side`` is what it was busy with."""

    def __init__(self, why: str, side: str):
        super().__init__(why)
        self.side = side


def _serve(pipe: Connection, options: dict) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to all; the parent decides
    import gc

    import torch

    from benchmarks.gpu import check, machine, measure_case

    device = torch.device(options.pop("device"))
    measure_case.use_exact_float32()
    if device.type == "cpu":
        torch.set_num_threads(1)  # a dry run's tensors are small, and a busy machine makes parallel regions wait

    gc.freeze()  # what was imported stays: collections between sides look at the rest alone
    pipe.send(("done", machine.conditions(device) | {"truth": check.truth_name(), "tolerances": check.TOLERANCES}))
    while True:
        try:
            case, exclude, seconds = pipe.recv()
        except EOFError:  # the parent is gone
            return
        options |= {"exclude": exclude, "seconds": seconds, "say": lambda side: pipe.send(("side", side))}
        try:
            pipe.send(("done", measure_case.measure_case(case, device, **options)))
        except measure_case.DeviceLost as error:
            pipe.send(("lost", f"the device was lost: {error}"))
            return
        except Exception as error:  # of a case, not of a side: the next case has another chance
            pipe.send(("done", {"case": case.name, "sides": {}, "notes": [f"{type(error).__name__}: {error}"[:400]]}))


class Worker:
    """Starts the process when it is first needed, and anew after it was lost."""

    def __init__(
        self, options: dict, report: Callable[[str], None], serve: Callable[[Connection, dict], None] = _serve
    ):
        self.options, self.report, self.serve = options, report, serve
        self.process = self.conditions = None

    def start(self) -> dict:
        """Start the process if there is none; returns the machine's conditions."""
        if self.process is None:
            self.process = Process(self.serve, self.options)
            self.conditions = self._receive(START_SECONDS)
        return self.conditions

    def run(self, case: Case, deadline: float) -> dict:
        """Measure ``case``; a side that takes the process down is left out of a second try.

        Args:
            deadline: on :func:`time.monotonic`'s clock; at it the process is stopped.
        """
        exclude: dict[str, str] = {}
        while True:
            try:
                self.start()
                self.process.pipe.send((case, exclude, deadline - time.monotonic()))
                return self._receive(deadline - time.monotonic())
            except (WorkerLost, BrokenPipeError) as error:
                self.stop(at_once=True)
                side = getattr(error, "side", "")
                self.report(f"{case.name}: {error} ({side or 'no side'})")
                if not side or side in exclude or time.monotonic() >= deadline:
                    return {"case": case.name, "sides": {}, "notes": [f"{error}; busy with {side or 'no side'}"]}
                exclude[side] = str(error)

    def _receive(self, seconds: float) -> dict:
        end, side = time.monotonic() + seconds, ""
        while True:
            try:
                kind, message = self.process.receive(end - time.monotonic())
            except TimeoutError:
                kind, message = "lost", f"stopped after {seconds:.0f} s"
            except Ended as error:
                kind, message = "lost", f"the measuring process ended with code {error.code}"
            if kind == "lost":
                raise WorkerLost(message, side)
            if kind == "done":
                return message
            side = message

    def stop(self, at_once: bool = False) -> None:
        """End the process: an idle one ends by itself, unless ``at_once``; one that hangs by force."""
        if self.process is not None:
            self.process.stop(0 if at_once else STOP_SECONDS)
        self.process = None
