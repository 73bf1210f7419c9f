"""A function in a process of its own and the messages between it and this one; and a command in one, line by line."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

DAY = 86400.0  # seconds: no limit
GRACE_SECONDS = 15  # for a command to end when it is told to stop
JOIN_SECONDS = 10.0  # for a process that has closed its pipe to end

_forkserver = multiprocessing.get_context("forkserver")  # forks from a server that only imports: threads do not fork
_forkserver.set_forkserver_preload(["torch", "perceiver_pytorch"])


class Ended(RuntimeError):
    """The process is gone and sends no more; ``code`` is its exit code."""

    def __init__(self, code: int | None):
        super().__init__(f"the process ended with exit code {code}")
        self.code = code

    @property
    def killed(self) -> bool:
        """Whether it got SIGKILL, which a system without memory sends."""
        return self.code == -signal.SIGKILL


class Process:
    """Runs ``target(pipe, *args)``, all of which is pickled; at the end of a ``with`` block it is ended by force.

    Args:
        target: sends its results through the pipe, and may receive messages from it.
        args: its further arguments.
    """

    def __init__(self, target: Callable, *args: object):
        self.pipe, theirs = _forkserver.Pipe()
        self._process = _forkserver.Process(target=target, args=(theirs, *args))
        self._process.start()
        theirs.close()  # so that its end is noticed

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def receive(self, seconds: float | None = None) -> object:
        """The next message; None waits as long as it takes.

        Raises:
            TimeoutError: there was none for so many seconds.
            Ended: there will be none.
        """
        try:
            if not self.pipe.poll(None if seconds is None else max(0.0, seconds)):
                raise TimeoutError(f"no answer for {seconds:g} s")
            return self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self._process.join(JOIN_SECONDS)
            raise Ended(self._process.exitcode) from None

    def stop(self, patience: float | None = 0.0) -> None:
        """End the process: by itself within ``patience`` seconds (None: however long it takes), else by force."""
        self.pipe.close()
        self._process.join(patience)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()


def run_command(
    command: list[str],
    folder: Path,
    report: Callable[[str], object],
    environment: dict[str, str] | None = None,
    seconds: float = DAY,
) -> tuple[int | None, float]:
    """Run ``command`` in ``folder``; ``report`` is called with every line that it prints.

    Returns:
        Its exit code, None when it was stopped after ``seconds``; and how long it took.
    """
    start = time.monotonic()
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    with subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True, **options) as process:
        stops = ((seconds, signal.SIGINT), (seconds + GRACE_SECONDS, signal.SIGKILL))
        timers = [threading.Timer(after, os.killpg, (process.pid, number)) for after, number in stops]
        try:
            for timer in timers:
                timer.start()
            for line in process.stdout:
                report(line)
            process.wait()
        finally:
            for timer in timers:
                timer.cancel()
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    took = time.monotonic() - start
    return process.returncode if took < seconds else None, took
