"""The steps of a run, one after the other; what each found is on disk before the next begins."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.gpu import machine, prepare, record, tools
from benchmarks.gpu.cases import Case
from benchmarks.gpu.runs import Step
from benchmarks.gpu.worker import Worker, WorkerLost
from benchmarks.output import save

CASE_SECONDS = 75.0  # a case that takes longer hangs
LEAST_SECONDS = 10.0  # with less left nothing is started


class Steps:
    """Does them; ``result`` is the battery's, and is complete or says what is missing at any time.

    Args:
        out: where files go.
        result: gets what the steps find.
        capability: of the GPU, as "90"; None is a dry run.
        compile_mode: where compiled peers are measured.
    """

    def __init__(self, out: Path, result: dict, capability: str | None, compile_mode: str):
        self.out, self.result, self.capability = out, result, capability
        self.dry = capability is None
        options = {"device": "cpu" if self.dry else "cuda", "dry": self.dry, "compile_mode": compile_mode}
        self.worker = Worker(options, lambda line: print(line, flush=True))

    def run(self, steps: Sequence[Step], end: float) -> None:
        """All of them until ``end``, on :func:`time.monotonic`'s clock; an interrupt ends them."""
        result, start, done = self.result, time.monotonic(), 0
        kinds: dict[str, Callable[[Step, float], None]] = {
            "build": self.build, "tests": self.tests, "timings": self.timings,
            **{kind: self.tool for kind in ("trials", "sanitizer", "counters", "tuner")},
        }  # fmt: skip
        try:
            for done, step in enumerate(steps):
                if step.kind != "timings":
                    result[step.kind] = {"outcome": "running"}
                self.save()
                try:
                    kinds[step.kind](step, end - sum(later.seconds for later in steps[done + 1 :]))
                except WorkerLost as error:  # no process could be started: there are other steps
                    result["outcome"] = f"failed: {error}"
            if result["outcome"] == "running":
                result["outcome"] = "budget spent" if self.unmeasured(steps) else "complete"
        except KeyboardInterrupt:
            result["outcome"] = "interrupted"
        finally:
            reason = "the time was spent" if result["outcome"] == "budget spent" else result["outcome"]
            result["skipped"] += [{"case": case.name, "reason": reason} for case in self.unmeasured(steps)]
            for step in steps[done:] if result["outcome"] == "interrupted" else ():
                if step.kind != "timings":
                    result[step.kind] = {"outcome": "interrupted"}
            self.worker.stop(at_once=result["outcome"] == "interrupted")
            result["conditions"]["clocks_at_end"] = machine.clocks()
            result["seconds"] = round(time.monotonic() - start, 1)
            self.save()

    def save(self) -> None:
        save(self.out / "battery.json", self.result)

    def unmeasured(self, steps: Sequence[Step]) -> list[Case]:
        """Cases of these steps that the result does not have."""
        measured = {case["case"] for case in self.result["cases"]}
        return [case for step in steps for case in step.cases if case.name not in measured]

    def build(self, step: Step, until: float) -> None:
        """The extension, in place."""
        self.result["build"] = prepare.build(self.out, until - time.monotonic(), self.capability)

    def tests(self, step: Step, until: float) -> None:
        """Of what runs on a GPU."""
        self.result["tests"] = prepare.test(self.out, until - time.monotonic(), self.dry)

    def tool(self, step: Step, until: float) -> None:
        """A command of benchmarks.gpu.tools."""
        seconds = until - time.monotonic()
        self.result[step.kind] = (
            getattr(tools, step.kind)(self.out, seconds, self.dry)
            if seconds > (0 if self.dry else LEAST_SECONDS)
            else {"outcome": "left out", "reason": "the time was spent"}
        )

    def timings(self, step: Step, until: float) -> None:
        """Cases, as many as there is time for."""
        result = self.result
        if step.cases and time.monotonic() < until:
            result["conditions"] |= self.worker.start()
        for number, case in enumerate(step.cases, 1):
            seconds = until - time.monotonic()
            if seconds <= (0 if self.dry else LEAST_SECONDS):
                break
            print(f"[{number}/{len(step.cases)}, {seconds:.0f} s left] {case.name}", flush=True)
            result["cases"].append(self.worker.run(case, min(until, time.monotonic() + CASE_SECONDS)))
            print(f"  {record.summary(result['cases'][-1])}", flush=True)
            self.save()
