"""Quantises the experts of a checkpoint to integers for the CPU: doc/converting.md.

python scripts/convert_cpu_weights.py -i MODEL -o OUTPUT --quant-method int8
"""

import sys

from kt_kernel.convert.settings import main

if __name__ == "__main__":
    sys.exit(main())
