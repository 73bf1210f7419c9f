"""``python -m tests.campaign.worker PART``: runs cases from stdin, a line of JSON each, and answers each with one.

A child process is what a case may take with it: its memory is limited, and its end is noticed by who asked.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
import traceback
import warnings

from .outcome import ERROR, Outcome

GIGABYTES = 6  # of address space: huge sizes fail to be allocated, rather than wake the kernel's killer


def run_case(part, case: dict) -> Outcome:
    """One case; an exception that the part does not expect is a finding."""
    try:
        return part.run(case)
    except Exception:
        outcome = Outcome()
        outcome.find(ERROR, traceback.format_exc(limit=-4).strip())
        return outcome


def main() -> None:
    """Answer until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever prints does not garble the answers
    if "libasan" not in os.environ.get("LD_PRELOAD", ""):  # whose own memory is terabytes of addresses
        resource.setrlimit(resource.RLIMIT_AS, (GIGABYTES << 30,) * 2)
    warnings.filterwarnings("ignore")
    import torch

    torch.use_deterministic_algorithms(True, warn_only=True)  # empty tensors hold NaN: who reads them too early shows
    torch.set_num_threads(1)
    part = importlib.import_module(f"{__package__}.{sys.argv[1]}")
    print(json.dumps({"ready": os.getpid()}), file=answers, flush=True)
    for line in sys.stdin:
        outcome = run_case(part, json.loads(line))
        print(json.dumps({"counts": outcome.counts, "findings": outcome.findings}), file=answers, flush=True)


if __name__ == "__main__":
    main()
