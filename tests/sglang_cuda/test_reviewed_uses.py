"""A release of SGLang that asks for a method's class, or a layer's local experts, where nobody read it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections import Counter
from pathlib import Path

import pytest
from sglang_uses import Use, differences, reviewed, uses_in

_REVIEWED = Path(__file__).with_name("reviewed_uses.txt")
_CLASS_OF_METHOD = """
class Layer:
    def forward(self, x):
        if isinstance(self.quant_method, (Fp8MoEMethod, Other)):
            return x
"""
_FORMS = """
def by_name(quant_method): return isinstance(quant_method, A)
def by_getattr(layer): return isinstance(getattr(layer, "quant_method", None), mod.A)
def by_walrus(layer): return isinstance((m := layer.quant_method), A)
def by_other_name(layer):
    method = layer.experts.quant_method
    return isinstance(method, A) and type(method) is A
def count(layer):
    return [layer.num_local_experts for _ in range(getattr(layer, "num_local_experts", 0))]
def not_meant(layer, method, quant_config):
    layer.num_local_experts = 3
    return isinstance(method, A) or isinstance(quant_config, A) or "num_local_experts"
"""


@pytest.fixture
def package(tmp_path):
    """A package with one file, whose one use is reviewed."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "new.py").write_text(_CLASS_OF_METHOD)
    return tmp_path


def test_every_use_in_the_installed_sglang_is_reviewed():
    package = Path(importlib.util.find_spec("sglang").origin).parent / "srt"
    found = uses_in(package)
    assert len(found) > 100, f"SGLang's sources are not in {package}"
    problems = differences(found, reviewed(_REVIEWED))
    assert not problems, "\n".join(
        [
            f"SGLang {importlib.metadata.version('sglang')} asks for the class of a layer's method, or for "
            "its local experts, in other places than those that were reviewed. Read each in sglang/srt, see "
            f"that HybridMoEMethod is right there or make it so, then correct its line in {_REVIEWED.name}:",
            *problems,
        ]
    )


def test_every_form_of_use_is_found_and_nothing_else(tmp_path):
    (tmp_path / "forms.py").write_text(_FORMS)
    found = {(use.function, use.what): times for use, times in uses_in(tmp_path).items()}
    assert found == {
        ("by_name", "isinstance(A)"): 1,
        ("by_getattr", "isinstance(mod.A)"): 1,
        ("by_walrus", "isinstance(A)"): 1,
        ("by_other_name", "isinstance(A)"): 1,
        ("by_other_name", "type()"): 1,
        ("count", "num_local_experts"): 2,
    }


def test_a_use_in_a_new_function_is_named(package):
    (use,) = uses_in(package)
    assert use == Use("models/new.py", "Layer.forward", "isinstance(Fp8MoEMethod|Other)")
    (problem,) = differences(uses_in(package), Counter())
    assert problem == f"new: {use} (1 times, reviewed 0)"


def test_another_use_in_a_reviewed_function_is_named(package):
    before = uses_in(package)
    more = _CLASS_OF_METHOD + "        return isinstance(self.quant_method, (Fp8MoEMethod, Other))\n"
    (package / "models" / "new.py").write_text(more)
    (problem,) = differences(uses_in(package), before)
    assert problem.endswith("(2 times, reviewed 1)")


def test_another_class_in_a_reviewed_test_is_named(package):
    before = uses_in(package)
    (package / "models" / "new.py").write_text(_CLASS_OF_METHOD.replace("Other", "Newer"))
    new, gone = differences(uses_in(package), before)
    assert new.startswith("new: ")
    assert "Newer" in new
    assert gone.startswith("gone: ")
    assert "Other" in gone


def test_a_use_without_a_reason_is_refused(tmp_path):
    list_of_uses = tmp_path / "reviewed.txt"
    list_of_uses.write_text("Title.\n\n    models/new.py::f num_local_experts x1\n")
    with pytest.raises(ValueError, match="line 3: no reason stands above"):
        reviewed(list_of_uses)


def test_a_use_that_is_listed_twice_is_refused(tmp_path):
    list_of_uses = tmp_path / "reviewed.txt"
    line = "    models/new.py::f num_local_experts x1\n"
    list_of_uses.write_text(f"Title.\n\nReason.\n{line}{line}")
    with pytest.raises(ValueError, match=r"line 5: models/new\.py::f num_local_experts stands here twice"):
        reviewed(list_of_uses)
