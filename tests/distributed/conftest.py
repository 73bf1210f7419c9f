"""Modules beside the tests, which the processes that they start import too."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
