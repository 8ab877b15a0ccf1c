"""The registry must be right where it can be checked here; mistakes in the user's file must be explained."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from kt_kernel.errors import ConfigurationError
from kt_kernel.formats.records import RECORDS
from kt_kernel.planning import registry
from kt_kernel.planning.registry import Registry, load_registry, shipped_entries

ENTRIES = shipped_entries()


@pytest.fixture(autouse=True)
def user_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the user's entries would be."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    (tmp_path / "kt-kernel").mkdir()
    return tmp_path / "kt-kernel" / "models.yaml"


def names_in_sglang(file: str, table: str) -> set[str]:
    """The keys of a parser table, from SGLang's text: importing it takes seconds."""
    root = importlib.util.find_spec("sglang").submodule_search_locations[0]
    text = (Path(root) / file).read_text()
    body = text[text.index(table) :]
    return set(re.findall(r'"([\w.-]+)":', body[: body.index("\n    }")]))


def test_parsers_are_known_to_the_installed_sglang():
    tools = names_in_sglang("srt/function_call/function_call_parser.py", "ToolCallParserEnum:")
    reasoning = names_in_sglang("srt/parser/reasoning_parser.py", "DetectorMap:")
    assert {"deepseekv3", "qwen25"} <= tools and {"deepseek-r1", "qwen3"} <= reasoning
    for entry in ENTRIES:
        assert entry.tool_call_parser in {None, *tools}, entry.name
        assert entry.reasoning_parser in {None, *reasoning}, entry.name


def test_architectures_are_known_to_the_installed_sglang():
    models = Path(importlib.util.find_spec("sglang").submodule_search_locations[0]) / "srt" / "models"
    known = set(
        re.findall(
            r"EntryClass\s*=\s*(.*?)(?:\n\n|\Z)",
            "\n\n".join(f.read_text() for f in models.glob("*.py")),
            re.S,
        )
    )
    classes = set(re.findall(r"\w+", " ".join(known)))
    for entry in ENTRIES:
        assert set(entry.config.get("architectures", ())) <= classes, entry.name


def test_methods_exist():
    assert {entry.method for entry in ENTRIES} <= set(RECORDS)


@pytest.mark.parametrize("entry", [e for e in ENTRIES if e.active_parameters], ids=lambda e: e.name)
def test_sizes_agree_with_the_published_numbers_of_parameters(entry):
    """A wrong size shows: experts are most of the parameters, and the active ones follow from all sizes."""
    try:
        facts = entry.facts()
    except ConfigurationError:
        pytest.skip("its sizes are not known")
    experts = facts.sizes.moe_layers * facts.sizes.experts * facts.sizes.expert_parameters
    if entry.parameters:
        assert 0.75 * entry.parameters < experts < entry.parameters or entry.name == "demo"
    active = facts.active_expert_parameters + facts.read_dense_parameters
    assert active == pytest.approx(entry.active_parameters, rel=0.35)


@pytest.mark.parametrize("name", ["deepseek-v3", "DEEPSEEK-V3-0324", "deepseek-ai/DeepSeek-V3-0324"])
def test_names_aliases_and_hub_ids_are_found_in_any_case(name):
    assert load_registry().find(name).name == "DeepSeek-V3-0324"


def test_folder_name_tells_models_of_one_size_apart():
    known = load_registry()
    sizes = known.find("deepseek-r1").sizes()
    assert known.like("DeepSeek-R1-0528", sizes).reasoning_parser == "deepseek-r1"
    assert known.like("DeepSeek-V3-0324", sizes).reasoning_parser is None
    assert known.like("my-tune", sizes).tool_call_parser == "deepseekv3"


def test_folder_named_as_on_the_hub_is_that_model():
    """Many names begin with another's: DeepSeek-V3.1 with the alias deepseek-v3."""
    known = Registry(ENTRIES)
    for entry in ENTRIES:
        if "num_hidden_layers" in str(entry.config):
            for hub_id in entry.hub:
                found = known.like(hub_id.rpartition("/")[2], entry.sizes())
                assert found is entry, f"{hub_id} is taken for {found.name}"


def test_users_entry_adds_and_replaces_single_fields(user_file):
    user_file.write_text(
        "models:\n"
        "  Qwen3-30B-A3B: {tool_call_parser: hermes}\n"
        "  mine: {config: {model_type: qwen3_moe, num_hidden_layers: 2}, aliases: [m]}\n"
    )
    known = load_registry()
    assert known.find("qwen3-30b").tool_call_parser == "hermes"
    assert known.find("qwen3-30b").reasoning_parser == "qwen3"
    assert known.find("m").name == "mine"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("models: [", "no readable YAML"),
        ("- 1", "must hold 'models:'"),
        ("models: {x: 3}", "model 'x', is a int, expected fields"),
        ("models: {x: {confg: {}}}", "has a field 'confg'; known are active_parameters"),
        ("models: {x: {hub: [a/b]}}", "has no 'config'"),
        ("models: {x: {config: {}, method: Q4}}", "method: 'Q4', expected one of BF16"),
        ("models: {x: {config: {}, parameters: many}}", "expected a number"),
        ("models: {x: {config: {}, aliases: [3]}}", "expected a list of texts"),
        ("models: {x: {config: {}, aliases: [qwen3-30b]}}", "calls both Qwen3-30B-A3B and x 'qwen3-30b'"),
    ],
)
def test_mistake_in_the_users_file_is_one_sentence(user_file, content, message):
    user_file.write_text(content)
    with pytest.raises(ConfigurationError, match=re.escape(message)) as caught:
        load_registry()
    assert str(user_file) in str(caught.value)


def test_nothing_claims_to_be_verified_that_could_not_be():
    assert [entry.name for entry in ENTRIES if entry.verified] == ["demo"]


def test_file_of_the_package_is_found_and_names_are_unique():
    assert registry.SHIPPED.is_file()
    Registry(ENTRIES)
