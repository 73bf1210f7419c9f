"""The campaign: random cases against ground truth, mutated raw calls, sanitizers, threads and staleness.

    make campaign MINUTES=10             everything, in that time; the table goes to out/campaign
    python -m tests.campaign --help      a part, a case by its seed, a saved failure

A part is a module with ``draw(seed)``, which makes a case, a dict of plain data, and ``run(case)``, which returns an
:class:`~campaign.outcome.Outcome`. Cases run in child processes, so that a crash is a finding like any other.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "out" / "campaign"

sys.path.append(str(ROOT / "tests"))  # helpers of the tests, as under pytest
