"""Statistics files: one that is damaged or of another model must stop the start, not place wrong experts."""

from __future__ import annotations

import json

import numpy
import pytest
import torch

from kt_kernel.errors import ConfigurationError
from kt_kernel.hybrid.activation import read_activation_counts

COUNTS = [[1, 2, 3], [4, 0, 6]]


def write(path, content):
    if path.suffix == ".pt":
        torch.save(content, path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(content))
    else:
        numpy.save(path, content)
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.pt", torch.tensor(COUNTS)),
        ("a.pt", {"logical_count": torch.tensor([COUNTS], dtype=torch.int32), "rank": 0}),
        ("a.json", COUNTS),
        ("a.json", {"logical_count": COUNTS}),
        ("a.npy", numpy.array(COUNTS, dtype=numpy.float32)),
    ],
)
def test_every_form_gives_the_same_counts(tmp_path, name, content):
    counts = read_activation_counts(write(tmp_path / name, content), 2, 3)
    assert counts.dtype == torch.float64
    assert counts.tolist() == COUNTS


@pytest.mark.parametrize("suffix", [".pt", ".json", ".npy"])
def test_steps_are_summed(tmp_path, suffix):
    steps = [COUNTS, COUNTS, COUNTS]
    content = torch.tensor(steps) if suffix == ".pt" else steps
    counts = read_activation_counts(write(tmp_path / f"a{suffix}", content), 2, 3)
    assert counts.tolist() == [[3, 6, 9], [12, 0, 18]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([[1, 2]], r"shape \[1, 2\] .* the model has \[2, 3\]"),
        ([1, 2, 3], "shape"),
        (7, "shape"),
        ([[1, 2, 3], [4, -1, 6]], "no counts"),
        ([[1, 2, 3], [4, float("nan"), 6]], "no counts"),
        ([[1, 2, 3], [4, float("inf"), 6]], "no counts"),
        ([[0, 0, 0], [0, 0, 0]], "all zero"),
        ([[1, 2, 3], [4, 5]], "no table of numbers"),
        ([["a", 2, 3], [4, 5, 6]], "no table of numbers"),
        ({"counts": COUNTS}, "expected 'logical_count'"),
        ({"logical_count": None}, "no table of numbers"),
    ],
)
def test_what_is_no_table_of_counts_of_this_model_is_refused(tmp_path, content, message):
    with pytest.raises(ConfigurationError, match=message) as raised:
        read_activation_counts(write(tmp_path / "a.json", content), 2, 3)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("suffix", [".pt", ".json", ".npy"])
def test_a_damaged_file_is_refused_in_one_sentence(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"\x80\x02 not what the name says")
    with pytest.raises(ConfigurationError, match="cannot be read") as raised:
        read_activation_counts(path, 2, 3)
    assert "\n" not in str(raised.value)


class _Surprise:
    def __reduce__(self):
        return (print, ("code from the file ran",))


def test_code_in_a_file_is_not_run(tmp_path, capsys):
    path = write(tmp_path / "a.pt", {"logical_count": _Surprise()})
    with pytest.raises(ConfigurationError, match="cannot be read") as caught:
        read_activation_counts(path, 2, 3)
    assert "weights_only" not in str(caught.value), "torch's advice is to run the code"
    assert "code" not in capsys.readouterr().out


@pytest.mark.parametrize(("name", "message"), [("none.pt", "do not exist"), ("none.csv", r"'\.csv'")])
def test_a_path_that_names_no_statistics_is_refused(tmp_path, name, message):
    with pytest.raises(ConfigurationError, match=message):
        read_activation_counts(tmp_path / name, 2, 3)
