"""Modules, data and references that the tests of the spine share.

They stand in a module of their own (``spine_zoo``) because spawned processes and pickles must be able to import them.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
