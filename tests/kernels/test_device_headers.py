"""Functions of the device runtime as device_runtime.h calls them, against the vendors' headers and libraries.

The extension looks functions up by name and does not see their declarations: a wrong argument would corrupt
memory on a GPU. Here each member of DeviceRuntime is compared with the function that it is looked up as.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from cuda_packages import cuda_package
from tools import tool

ROOT = Path(__file__).resolve().parents[2]
HEADER = ROOT / "csrc" / "core" / "device_runtime.h"
ENTRY_POINT = re.compile(r'visit\(runtime\.(\w+), "(\w+)", FoundIn::(\w+)\)')
# A constant of ours: its value, then in the comment the names that CUDA has for it.
CONSTANT = re.compile(r"constexpr \w+ (k\w+) = ([\d |]+);\s+// ((?:cuda|CU_)\w+(?: \| cuda\w+)*)")


@dataclass(frozen=True)
class Vendor:
    """A release of a device runtime: its headers and library, below a package of tests/cuda-packages.lock."""

    prefix: str
    places: frozenset[str]  # the values of FoundIn that mean this release
    package: str
    include: str
    library: str | None
    headers: tuple[str, ...]

    def entry_points(self) -> list[tuple[str, str]]:
        """(member of DeviceRuntime, function) of each that is looked up here."""
        prefixes = {"kCudaDriver": "cu"}
        here = [row for row in rows() if row[2] in self.places]
        return [(member, prefixes.get(place, self.prefix) + name) for member, name, place in here]


CUDA_HEADERS = ("#include <cuda_runtime_api.h>", "#include <cuda.h>")
CUDA_12 = Vendor(
    prefix="cuda",
    places=frozenset({"kEvery", "kBeforeCuda13", "kCuda", "kCudaDriver"}),
    package="cudart12",
    include="nvidia/cuda_runtime/include",
    library="nvidia/cuda_runtime/lib/libcudart.so.12",
    headers=(*CUDA_HEADERS, "static_assert(CUDART_VERSION / 1000 == 12);"),
)
CUDA_13 = Vendor(
    prefix="cuda",
    places=frozenset({"kEvery", "kCuda13", "kCuda", "kCudaDriver"}),
    package="cudart13",
    include="nvidia/cu13/include",
    library="nvidia/cu13/lib/libcudart.so.13",
    headers=(*CUDA_HEADERS, "static_assert(CUDART_VERSION / 1000 == 13);"),
)
HIP = Vendor(
    prefix="hip",
    places=frozenset({"kEvery", "kBeforeCuda13", "kHip"}),
    package="triton",
    include="triton/backends/amd/include",
    library=None,
    headers=(
        "#define __HIP_PLATFORM_AMD__",
        "#define __HIP_DISABLE_CPP_FUNCTIONS__",
        "#include <hip/hip_runtime_api.h>",
    ),
)

every_vendor = pytest.mark.parametrize("vendor", [CUDA_12, CUDA_13, HIP], ids=["cuda12", "cuda13", "hip"])
every_library = pytest.mark.parametrize("vendor", [CUDA_12, CUDA_13], ids=["cuda12", "cuda13"])


def rows() -> list[tuple[str, str, str]]:
    """The list in device_runtime.h: member, name without prefix, place."""
    return ENTRY_POINT.findall(HEADER.read_text())


def constants() -> list[tuple[str, str, str]]:
    """Constants in csrc/core that repeat one of CUDA's: name, value, CUDA's."""
    return [
        row
        for file in sorted((ROOT / "csrc/core").glob("*.cc"))
        for row in CONSTANT.findall(file.read_text())
    ]


def compiled(vendor: Vendor, *lines: str) -> subprocess.CompletedProcess[str]:
    """The lines checked by a compiler that has seen the vendor's headers and ours."""
    source = [
        *vendor.headers,
        '#include "core/device_runtime.h"',
        '#include "device_headers.h"',
        "using kt::DeviceRuntime;",
        "using device_headers::fits;",
        *lines,
        "",
    ]
    theirs = [
        cuda_package(vendor.package) / vendor.include,
        # crt/host_defines.h is not part of the runtime's package; triton brings one.
        cuda_package("triton") / "triton/backends/nvidia/include",
    ]
    folders = [
        f"-I{ROOT / 'csrc'}",
        f"-I{Path(__file__).parent}",
        *(f"-isystem{folder}" for folder in theirs),
    ]
    return subprocess.run(
        [tool("c++", "g++", "clang++"), "-std=c++17", "-fsyntax-only", *folders, "-x", "c++", "-"],
        input="\n".join(source),
        capture_output=True,
        text=True,
        timeout=480,
    )


def in_hip(names_of_cuda: str) -> str:
    return re.sub(r"\bcuda", "hip", names_of_cuda).replace(
        "CU_STREAM_WAIT_VALUE_GEQ", "hipStreamWaitValueGte"
    )


def check(member: str, function: str) -> str:
    message = f"{member} is not {function}"
    return f'static_assert(fits<decltype(DeviceRuntime::{member}), decltype(&{function})>(), "{message}");'


@every_vendor
def test_each_member_is_one_function(vendor):
    members = [member for member, _ in vendor.entry_points()]
    assert len(set(members)) == len(members)


@every_vendor
def test_each_function_is_called_with_the_arguments_it_takes(vendor):
    done = compiled(vendor, *(check(member, function) for member, function in vendor.entry_points()))
    assert done.returncode == 0, done.stderr


def test_no_member_is_missing_from_the_list():
    """All members are pointers, so that their number shows in the size."""
    members = {member for member, _, _ in rows()}
    done = compiled(CUDA_13, f"static_assert(sizeof(DeviceRuntime) == {len(members)} * sizeof(void*));")
    assert done.returncode == 0, done.stderr


@every_vendor
def test_constants_are_the_vendors(vendor):
    found = constants()
    assert {"kCapturing", "kMove", "kNotSupported"} <= {name for name, _, _ in found}
    checks = [f'static_assert(({value}) == ({theirs}), "{name}");' for name, value, theirs in found]
    if vendor is HIP:
        checks = [in_hip(check) for check in checks]
    done = compiled(vendor, *checks)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("int (*)(void*, unsigned)", "int (*)(void*)"),  # an argument too many
        ("int (*)(unsigned)", "int (*)(size_t)"),
        ("int (*)(void*)", "int (*)(unsigned long long)"),
        ("int (*)(int*)", "int (*)(size_t*)"),
        ("int (*)(void*)", "int (*)(const void*)"),
        ("int (*)(void*)", "int (*)(void (*)(void*))"),
        ("void (*)(void*)", "cudaError_t (*)(void*)"),
        ("int (*)(int*)", "int (*)(cudaStream_t*)"),
        ("int (*)(kt::HostFunction)", "int (*)(void (*)(cudaStream_t, cudaError_t, void*))"),
    ],
)
def test_wrong_types_would_be_seen(ours, theirs):
    assert compiled(CUDA_13, f"static_assert(!fits<{ours}, {theirs}>());").returncode == 0


@every_library
def test_each_name_is_in_the_library(vendor):
    library = ctypes.CDLL(str(cuda_package(vendor.package) / vendor.library), mode=ctypes.RTLD_LOCAL)
    functions = [function for _, function in vendor.entry_points() if function.startswith("cuda")]
    assert functions and [name for name in functions if not hasattr(library, name)] == []


@every_library
def test_the_extension_finds_the_library_that_the_process_has_loaded(vendor):
    """The real runtime needs no driver to be looked into; a process of its own, because it stays loaded."""
    program = """
import ctypes, sys
from kt_kernel import kt_kernel_ext
before = kt_kernel_ext.device_runtime_present()
library = ctypes.CDLL(sys.argv[1])
print(before, kt_kernel_ext.device_runtime_present())
"""
    library = cuda_package(vendor.package) / vendor.library
    done = subprocess.run(
        [sys.executable, "-c", program, library], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    if torch.version.cuda is None:
        assert done.stdout.split() == ["False", "True"]
    else:
        assert done.stdout.split()[1] == "True"
