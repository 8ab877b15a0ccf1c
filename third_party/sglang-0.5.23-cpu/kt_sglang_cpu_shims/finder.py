"""The import finder that offers the stand-ins, to SGLang only."""

import importlib
import importlib.machinery
import sys

PACKAGES = ("triton", "torchvision", "sgl_kernel")

# Who may load a stand-in. transformers, torch and others probe for these packages to choose a faster path:
# for them the answer stays "not installed". Once a package is loaded, its submodules are there for
# everybody.
_AUDIENCE = ("sglang", *PACKAGES)

# SGLang probes for these and does without. triton.knobs: hooks on kernel launches, of which there are none
# here.
_ABSENT_SUBMODULES = ("triton.knobs",)


def _importing_package():
    """Top-level package of the code that runs the import, "" when unknown."""
    frame = sys._getframe(2)
    while frame is not None and "importlib" in frame.f_code.co_filename:
        frame = frame.f_back
    return "" if frame is None else frame.f_globals.get("__name__", "").partition(".")[0]


def _let_torch_conclude_that_triton_is_absent():
    """Have torch ask, and remember, before the stand-in is in `sys.modules`; it would take it for real."""
    if "torch" in sys.modules:
        importlib.import_module("torch.utils._triton").has_triton_package()


class StandInFinder:
    """Last entry of `sys.meta_path`; its methods are static, so the class itself is the finder."""

    @staticmethod
    def find_spec(fullname, path=None, target=None):
        package, _, submodule = fullname.partition(".")
        if package not in PACKAGES or fullname in _ABSENT_SUBMODULES:
            return None
        if not submodule and _importing_package() not in _AUDIENCE:
            return None
        if fullname == "triton":
            _let_torch_conclude_that_triton_is_absent()
        return importlib.machinery.ModuleSpec(
            fullname, StandInLoader, origin="kt-sglang-cpu-shims", is_package=True
        )


class StandInLoader:
    @staticmethod
    def create_module(spec):
        from .stand_in import StandInModule

        return StandInModule(spec.name)

    @staticmethod
    def exec_module(module):
        from .contents import fill

        fill(module)
