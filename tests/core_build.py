"""What the tests in C++ of csrc/core are compiled from, for any kind of machine."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HERE = ROOT / "tests/core"
spec = importlib.util.spec_from_file_location("perceiver_fast_setup", ROOT / "setup.py")
setup = importlib.util.module_from_spec(spec)
spec.loader.exec_module(setup)

ONCE_AN_ISA = ("functions", "tiles", "vectors")
ONCE = ("attention", "main", "regions", "rows")


def sources_of_tests():
    """(name of the object, source, flags) of the tests."""
    yield from ((f"test_{name}", HERE / f"{name}.cpp", []) for name in ONCE)
    for name in ONCE_AN_ISA:
        yield from ((f"test_{name}_{isa}", HERE / f"{name}.cpp", flags) for isa, flags in setup.isa_flags().items())
