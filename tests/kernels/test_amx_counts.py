"""Risk: a compiler or a change adds tile loads to the loop of all AMX kernels, or the counts miss it."""

from __future__ import annotations

import os
from pathlib import Path

import amx_counts
import pytest
from test_instruction_leaks import of_the_build

AMX_SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "kernels" / "amx"

# A loop of eight instructions behind one that zeroes; objdump without raw bytes.
LOOP = """
0000000000000000 <_Z4gemm>:
   0:\ttilezero %tmm0
   5:\ttileloadd (%r9,%r13,1),%tmm6
   b:\ttileloadd (%r8,%rsi,1),%tmm4
  11:\ttdpbf16ps %tmm6,%tmm4,%tmm0
  16:\ttileloadd (%rdx,%r13,1),%tmm7
  1c:\ttdpbf16ps %tmm7,%tmm4,%tmm1
  21:\ttileloadd (%rdx,%rsi,1),%tmm5
  27:\ttdpbf16ps %tmm6,%tmm5,%tmm2
  2c:\ttdpbf16ps %tmm7,%tmm5,%tmm3
  31:\tjne    5 <gemm+0x5>
  33:\tret
0000000000000040 <DecodedTiles>:
  40:\tvpermw (%rax),%zmm1,%zmm2
  46:\tvpsrlw $0x4,%zmm2,%zmm3
  4c:\tvmovdqa64 %zmm2,(%rdx)
  52:\tvmovdqa64 %zmm3,0x40(%rdx)
  58:\tjne    40 <decode>
"""


def test_counts_of_a_loop_are_those_by_hand():
    assert amx_counts.counts(LOOP) == amx_counts.Counts(
        products_a_load=1, products_a_kib=2, decoding=16, adding=None
    )
    one_more = LOOP.replace("  2c:\ttdpbf16ps", "  28:\ttileloadd (%rdx,%rsi,1),%tmm5\n  2c:\ttdpbf16ps")
    assert amx_counts.counts(one_more).products_a_load == 0.8


def test_every_amx_kernel_has_a_product_for_each_load():
    objects = [o for o in of_the_build() or [] if o.name.startswith("kernels/amx/")]
    if not objects:
        reason = "NOT RUN: no finished build in this checkout, whose AMX objects could be counted"
        pytest.fail(reason + "; CI must have one") if os.environ.get("CI") else pytest.skip(reason)
    assert {o.name for o in objects} == {f"kernels/amx/{p.name}" for p in AMX_SOURCES.glob("*.cc")}
    for o in objects:
        found = amx_counts.counts(amx_counts.listing_of(o.path))
        assert found.products_a_load >= amx_counts.LEAST_PRODUCTS_A_LOAD, o.name
        decodes = o.name not in ("kernels/amx/bf16.cc", "kernels/amx/int8_int8.cc")
        assert (found.decoding is not None) == decodes, o.name
