"""The scripts are no package: their directory is where `benchmarks` is found, as when one of them runs."""

from __future__ import annotations

import sys
from pathlib import Path

SCRIPTS = Path(__file__).parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))
