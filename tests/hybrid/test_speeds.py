"""Speeds in the user's cache: a damaged or foreign file would split every step wrongly from then on."""

from __future__ import annotations

import json

import pytest

from kt_kernel.errors import ConfigurationError
from kt_kernel.hybrid.speeds import ExpertSpeeds, read_speeds, seconds_per_expert, write_speeds

KEY = {"cpu": "a CPU", "device": "cpu", "hidden": 64}
SPEEDS = ExpertSpeeds(tokens=(1, 4, 16), cpu_seconds=(1e-4, 2e-4, 8e-4), fetch_seconds=1e-3)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "kt-kernel" / "speeds"


def only_file(cache):
    (path,) = cache.iterdir()
    return path


def test_what_was_measured_is_found_again_and_leaves_no_other_file(cache):
    assert read_speeds(KEY) is None
    write_speeds(KEY, SPEEDS)
    assert read_speeds(KEY) == SPEEDS
    only_file(cache)


@pytest.mark.parametrize("change", [{"cpu": "another"}, {"device": "a GPU"}, {"hidden": 128}])
def test_another_machine_or_shape_is_measured_by_itself(change):
    write_speeds(KEY, SPEEDS)
    assert read_speeds({**KEY, **change}) is None


def test_a_file_that_says_it_was_measured_elsewhere_is_not_used(cache):
    """E.g. a home directory that several machines share, with files copied by hand."""
    write_speeds(KEY, SPEEDS)
    content = json.loads(only_file(cache).read_text())
    content["key"]["cpu"] = "another"
    only_file(cache).write_text(json.dumps(content))
    assert read_speeds(KEY) is None


def damaged(**changes):
    speeds = {"tokens": [1, 4], "cpu_seconds": [1e-4, 2e-4], "fetch_seconds": 1e-3, **changes}
    return json.dumps({"key": KEY, "speeds": speeds})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '"text"',
        json.dumps({"key": KEY}),
        json.dumps({"key": KEY, "speeds": 3}),
        damaged(cpu_seconds=[1e-4]),
        damaged(cpu_seconds=[1e-4, -2e-4]),
        damaged(cpu_seconds=[1e-4, float("nan")]),
        damaged(cpu_seconds=["a", "b"]),
        damaged(tokens=[4, 1]),
        damaged(tokens=[], cpu_seconds=[]),
        damaged(fetch_seconds=0),
        damaged(fetch_seconds=None),
    ],
)
def test_a_damaged_file_is_measured_again(cache, text):
    write_speeds(KEY, SPEEDS)
    only_file(cache).write_text(text)
    assert read_speeds(KEY) is None
    write_speeds(KEY, SPEEDS)
    assert read_speeds(KEY) == SPEEDS


def test_a_cache_that_cannot_be_written_does_not_stop_the_server(cache, caplog):
    cache.parent.parent.mkdir(exist_ok=True)
    cache.parent.write_text("a file where the folder should be")
    assert read_speeds(KEY) is None
    write_speeds(KEY, SPEEDS)
    assert "cannot be kept" in caplog.text


def test_between_and_beyond_the_measurements_speeds_are_in_proportion():
    assert SPEEDS.cpu_seconds_of(1) == 1e-4
    assert SPEEDS.cpu_seconds_of(4) == 2e-4
    assert SPEEDS.cpu_seconds_of(10) == pytest.approx(5e-4)
    assert SPEEDS.cpu_seconds_of(32) == pytest.approx(16e-4)


def test_speeds_that_are_none_are_refused():
    with pytest.raises(ConfigurationError, match="no table of speeds"):
        ExpertSpeeds((1, 2), (1.0,), 1.0)


def test_the_first_call_which_may_still_allocate_is_not_measured():
    calls = []

    def work():
        calls.append(len(calls))
        return 4

    assert seconds_per_expert(work) > 0
    assert len(calls) > 2
