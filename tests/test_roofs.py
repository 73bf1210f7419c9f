"""What the CPU can do at most, as the extension measures it. Rates are not judged: machines differ and are busy."""

import math

import pytest
from support import needs_extension

from perceiver_fast import extension
from perceiver_fast.insight import roofs


@pytest.mark.skipif(**needs_extension)
def test_rates_are_finite_and_measured_once():
    found = roofs.measure_roofs(threads=2)
    assert found.threads == 2 and found is roofs.measure_roofs(threads=2)
    assert all(0 < rate < math.inf for rate in (found.multiply_adds, found.exponentials, found.copied_bytes))


@pytest.mark.skipif(**needs_extension)
def test_no_threads():
    with pytest.raises(ValueError, match="expected at least 1 thread, got 0"):
        extension.module.roofs(0)


def test_none_without_the_extension(monkeypatch):
    monkeypatch.setattr(extension, "module", None)
    assert roofs.measure_roofs(threads=3) is None
