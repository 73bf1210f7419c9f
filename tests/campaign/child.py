"""A worker process, as its parent sees it: asked for a case's outcome, started again when it died."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from . import ROOT
from .outcome import CRASH, HANG, Outcome

START_S = 180  # to import torch, under a sanitizer on a busy machine
CASE_S = 120


starts = subprocess.Popen  # or what has its methods


class CannotStart(RuntimeError):
    """The worker does not come up; the message has the end of what it said."""


class Child:
    """A worker for one part.

    Args:
        part: a module of this package.
        env: what its environment has beside ours.
        folder: where it runs, the place of the package that it imports. Default: the repository.
    """

    def __init__(self, part: str, env: dict[str, str] | None = None, folder: Path = ROOT):
        self.part, self.folder, self.popen = part, folder, starts
        self.env = os.environ | {"OMP_WAIT_POLICY": "passive", "PYTHONFAULTHANDLER": "1"} | (env or {})
        self.process: subprocess.Popen | None = None

    def run(self, case: dict) -> Outcome:
        """The outcome of a case; the end of the process, or its silence, is a finding."""
        if self.process is None or self.process.poll() is not None:
            self._start()
        try:
            self.process.stdin.write(json.dumps(case).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it died before the case came: seen as what it is below
        outcome = Outcome()
        answer = self._answer(CASE_S)
        if answer is None:
            outcome.find(HANG, f"no answer for {CASE_S} seconds")
            self.close()
        elif not answer:
            outcome.find(CRASH, self._last_words())
            self.close()
        else:
            found = json.loads(answer)
            outcome = Outcome(Counter(found["counts"]), found["findings"])
        return outcome

    def _start(self) -> None:
        self.errors = tempfile.TemporaryFile()
        command = [sys.executable, "-m", "tests.campaign.worker", self.part]
        self.process = self.popen(
            command, cwd=self.folder, env=self.env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors
        )
        if not self._answer(START_S):
            words = self._last_words()
            self.close()
            raise CannotStart(f"the worker of {self.part} did not start: {words}")

    def _answer(self, seconds: float) -> bytes | None:
        """The next line; empty when the process ended, None when it did not answer in time."""
        ready, _, _ = select.select([self.process.stdout], [], [], seconds)
        return self.process.stdout.readline() if ready else None

    def _last_words(self) -> str:
        """Why it ended, and the end of what it wrote to stderr."""
        try:
            code = self.process.wait(10)
        except subprocess.TimeoutExpired:
            code = None
        how = "still running" if code is None else f"exit status {code}" if code >= 0 else signal.Signals(-code).name
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").strip().splitlines()
        telling = [
            line for line in lines if "Sanitizer: " in line or "runtime error" in line or " in perceiver_fast" in line
        ]
        return "\n".join([how, *telling[:8], *lines[-30:]]).replace(f"{ROOT}/", "")

    def close(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process.stdin.close()
            self.process.stdout.close()
            self.errors.close()
            self.process = None

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *exc) -> None:
        self.close()
