from __future__ import annotations

import sys
from pathlib import Path

# test modules of one folder share their small federations
sys.path.insert(0, str(Path(__file__).parent))
