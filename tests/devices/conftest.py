"""Lets the tests of this folder, and the programs that they launch, import the modules beside them."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "spine")]
