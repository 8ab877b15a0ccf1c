"""Makes `import fuzz_targets` find the readers' own fuzzer, too."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "gguf_files"))
