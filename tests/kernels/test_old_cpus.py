"""Risk: the package works only on CPUs like the developer's; an older one gets SIGILL or wrong numbers.

qemu-user plays the CPU: Haswell (2013, AVX2 without AVX512) runs the installed package through the arithmetic
tests in a smaller sweep, and stops at the first instruction it lacks; Nehalem (2008, no AVX at all) must be
told so in words.
"""

from __future__ import annotations

from isolation import python
from test_every_cpu_variant import passed, run_arithmetic

SHOW = "from extension import ext; f = ext.cpu_features(); print('variant', f['variant'], *f['detected'])"


def test_haswell_is_seen_as_avx2():
    done = python("-c", SHOW, KT_TEST_EMULATED_CPU="Haswell")
    assert done.returncode == 0, done.stdout
    assert done.stdout.splitlines()[-1] == "variant avx2 avx2 fma f16c"


def test_arithmetic_on_haswell():
    done = run_arithmetic(KT_TEST_EMULATED_CPU="Haswell", KT_TEST_SWEEP="small")
    assert done.returncode == 0, done.stdout
    assert passed(done.stdout) > 300


def test_haswell_asked_to_be_more_than_it_is():
    done = python("-c", SHOW, KT_TEST_EMULATED_CPU="Haswell", KT_KERNEL_CPU_VARIANT="amx")
    assert done.returncode == 1
    assert "ValueError: KT_KERNEL_CPU_VARIANT is 'amx' but this CPU lacks avx512f" in done.stdout


def test_cpu_without_avx_gets_a_sentence():
    done = python("-c", SHOW, KT_TEST_EMULATED_CPU="Nehalem")
    assert done.returncode == 1, done.stdout
    assert (
        "ValueError: kt_kernel needs a CPU with AVX2, FMA and F16C; this CPU lacks avx2, fma, f16c"
        in done.stdout
    )
