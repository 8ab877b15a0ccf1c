"""The tests of this folder use the small model of tests/hybrid and the processes of tests/kernels."""

import sys
from pathlib import Path

for folder in ("api", "hybrid", "kernels"):
    sys.path.append(str(Path(__file__).parents[1] / folder))
