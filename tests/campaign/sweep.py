"""Many cases of one part, seed after seed, in as many processes as asked for, until the time is over."""

from __future__ import annotations

import importlib
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from . import OUT, ROOT
from .child import CannotStart, Child
from .outcome import ERROR, Outcome, is_failure
from .shrink import shrink

SHRINK_S = 15  # for a failure
SHRUNK = 5  # failures of a kind that are made smaller; more of them are told by their seeds


@dataclass(frozen=True)
class Run:
    """What is swept: a part, on an instruction set, in an ordinary or a sanitized build.

    Args:
        part: a module of this package.
        variant: what to call the environment.
        env, folder: as :class:`~campaign.child.Child` takes them.
    """

    part: str
    variant: str = ""
    env: dict[str, str] = field(default_factory=dict)
    folder: Path = ROOT

    @property
    def name(self) -> str:
        """Part and variant."""
        return f"{self.part}, {self.variant}" if self.variant else self.part


class Sweep:
    """Runs the cases of a :class:`Run`.

    Args:
        run: what to run.
        first: the first seed; the others follow.
        report: called with this sweep after every case.
    """

    def __init__(self, run: Run, first: int, report: Callable[[Sweep], None] = lambda sweep: None):
        self.run, self.report = run, report
        self.module = importlib.import_module(f"{__package__}.{run.part}")
        self.total, self.cases, self.seconds = Outcome(), 0, 0.0
        self.failures: list[dict] = []
        self._next, self._lock = first, threading.Lock()

    def for_seconds(self, seconds: float, jobs: int, most: int | None = None) -> Sweep:
        """Run cases for some time, and at most so many."""
        begin = time.monotonic()
        last = None if most is None else self._next + most
        threads = [threading.Thread(target=self._loop, args=(begin + seconds, last)) for _ in range(jobs)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.seconds += time.monotonic() - begin
        return self

    def _loop(self, deadline: float, last: int | None) -> None:
        with Child(self.run.part, self.run.env, self.run.folder) as child:
            while time.monotonic() < deadline:
                with self._lock:
                    seed, self._next = self._next, self._next + 1
                if last is not None and seed >= last:
                    return
                try:
                    self.one(child, self.module.draw(seed), deadline)
                except CannotStart as error:
                    with self._lock:
                        self.total.find(ERROR, str(error))
                        self.failures.append({"run": self.run.name, "kind": ERROR, "found": str(error)})
                    return

    def one(self, child: Child, case: dict, deadline: float) -> Outcome:
        """Run one case, and make smaller and keep what fails."""
        outcome = child.run(case)
        with self._lock:
            self.total.add(outcome)
            self.cases += 1
        for kind, text in outcome.findings.items():
            with self._lock:
                known = sum(failure["kind"] == kind for failure in self.failures)
                failure = {
                    "run": self.run.name,
                    "part": self.run.part,
                    "env": self.run.env,
                    "kind": kind,
                    "found": text,
                }
                failure |= {"what": self.describe(case)}
                self.failures.append(failure | {"case": case})
            if is_failure(kind) and known < SHRUNK:
                seconds = min(SHRINK_S, max(0.0, deadline - time.monotonic()))
                self._save(failure, kind, case, self._smallest(child, case, kind, seconds))
        self.report(self)
        return outcome

    def describe(self, case: dict) -> str:
        """A case in words, where its part has words for it."""
        return self.module.describe(case) if hasattr(self.module, "describe") else ""

    def _smallest(self, child: Child, case: dict, kind: str, seconds: float) -> dict:
        plain = getattr(self.module, "PLAIN", {})
        return shrink(case, lambda smaller: kind in child.run(smaller).findings, plain, seconds)

    def _save(self, failure: dict, kind: str, case: dict, smallest: dict) -> None:
        OUT.mkdir(parents=True, exist_ok=True)
        name = "-".join([*self.run.name.replace(",", "").split(), str(case["seed"]), *kind.split()])
        saved = failure | {"what": self.describe(smallest), "case": smallest, "drawn": case}
        (OUT / f"{name}.json").write_text(json.dumps(saved, indent=2) + "\n")
