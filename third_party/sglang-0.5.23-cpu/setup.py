"""Adds the one thing setuptools has no declaration for: a `.pth` file at the root of the wheel."""

from setuptools import setup
from setuptools.command.build_py import build_py

PTH = "kt_sglang_cpu_shims.pth"


class BuildWithPth(build_py):
    def run(self):
        super().run()
        self.mkpath(self.build_lib)
        self.copy_file(PTH, self.build_lib)

    def get_outputs(self, include_bytecode=True):  # noqa: FBT002 - the signature is setuptools'
        return [*super().get_outputs(include_bytecode), f"{self.build_lib}/{PTH}"]


setup(cmdclass={"build_py": BuildWithPth})
