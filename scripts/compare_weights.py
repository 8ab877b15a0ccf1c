"""How far a converted checkpoint is from its original, per layer: doc/converting.md.

python scripts/compare_weights.py ORIGINAL CONVERTED
"""

from __future__ import annotations

import argparse
import sys

from kt_kernel.convert.compare import compare
from kt_kernel.convert.layout import PROJECTIONS
from kt_kernel.errors import KTError


def main() -> int:
    """Exit status 1 with one sentence if the two cannot be compared."""
    parser = argparse.ArgumentParser(description="NMSE of weights and outputs, per layer of experts.")
    parser.add_argument("original")
    parser.add_argument("converted")
    parser.add_argument("--layers", type=int, nargs="*", default=[], help="default: all")
    parser.add_argument("--experts", type=int, default=8, help="of each layer (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=32, help="random tokens (default: %(default)s)")
    options = parser.parse_args()
    print(f"{'layer':>5}", *(f"{name:>10}" for name in (*PROJECTIONS, "output")))
    try:
        for row in compare(
            options.original,
            options.converted,
            layers=options.layers,
            experts=max(1, options.experts),
            tokens=max(1, options.tokens),
        ):
            print(f"{row.layer:5}", *(f"{value:10.2e}" for value in (*row.weights.values(), row.output)))
    except KTError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
