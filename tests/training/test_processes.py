"""Two processes on a host train what one does with both halves, and have the experts in memory once."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from accelerated import DATA, small_steps
from training_runs import train, trainable

from kt_kernel import kt_kernel_ext
from kt_kernel.errors import ConfigurationError
from kt_kernel.training.host import Alone, First, Place, meet

SIZES = {"hidden_size": 256, "moe_intermediate_size": 512, "num_experts": 32}
PACKED = 2 * 32 * 3 * 256 * 512 * 2  # bytes of both layers' experts in bfloat16


@pytest.fixture(scope="module")
def found(tiny, tmp_path_factory) -> Callable[[str], list]:
    """What the two processes wrote, by name."""
    folder = tmp_path_factory.mktemp("processes")
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *(str(Path(__file__).with_name("accelerated.py")), str(tiny(**SIZES)), str(folder)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return lambda name: [json.loads((folder / f"{name}-{index}.json").read_text()) for index in range(2)]


@pytest.mark.parametrize("way", ["accelerate", "fsdp2"])
def test_two_processes_train_what_one_does(tiny, found, way):
    model = trainable(tiny(**SIZES))
    alone = train(model, DATA, small_steps(model))
    for losses in found(way):
        assert losses == pytest.approx(alone, abs=1e-4)
    assert alone[-1] < alone[0] - 0.3


def test_the_experts_are_in_memory_once(found):
    first, second = found("memory")
    assert first["rss"] >= PACKED
    assert PACKED <= first["pss"] + second["pss"] <= 1.1 * PACKED
    for process in (first, second):
        assert process["anonymous"] < PACKED / 2


def test_processes_do_not_share_cores_where_these_go_round(found):
    first, second = (set(process["cpus"]) for process in found("memory"))
    if kt_kernel_ext.topology()["physical_cores"] < 2:
        assert first == second
    else:
        assert not first & second


def together(*whats: dict) -> list:
    """The hosts that processes 0, 1, ... meet, each loading `whats`; or their errors."""
    run = f"test-{os.getpid()}-{len(whats)}-{whats}"

    def one(index: int) -> object:
        try:
            return meet(Place(index, len(whats), run), whats[index])
        except ConfigurationError as error:
            return error

    with ThreadPoolExecutor(len(whats)) as pool:
        return list(pool.map(one, range(len(whats))))


def test_processes_meet_and_one_alone_waits_for_nobody():
    assert isinstance(together({"model": "a"})[0], Alone)
    hosts = together({"model": "a"}, {"model": "a"}, {"model": "a"})
    assert isinstance(hosts[0], First)
    cores = [host.cores for host in hosts]
    assert len({str(each) for each in cores}) == (3 if len(set().union(*cores)) >= 3 else 1)


def test_a_long_name_of_a_run_is_no_longer_than_a_socket_allows(monkeypatch):
    names = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "run" * 100}
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    first, second = Place.of_environment(), Place.of_environment()
    assert len(first.run) <= 80 and first.run != second.run


def test_a_second_first_process_is_an_error_in_one_sentence():
    run = f"test-{os.getpid()}-first"
    with socket.socket(socket.AF_UNIX) as taken:
        taken.bind(f"\0kt-training-{run}")
        with pytest.raises(ConfigurationError, match=r"give each a LOCAL_RANK of its own"):
            meet(Place(0, 2, run), {})


def test_two_processes_of_one_number_are_an_error():
    run = f"test-{os.getpid()}-twice"

    def one(index: int) -> str:
        with pytest.raises(ConfigurationError) as raised:
            meet(Place(index, 3, run), {})
        return str(raised.value)

    with ThreadPoolExecutor(3) as pool:
        first, *others = pool.map(one, (0, 1, 1))
    assert "have the LOCAL_RANKs [0, 1, 1]" in first
    assert all("ended while the model was loaded" in other for other in others)


def test_different_models_are_an_error_in_one_sentence():
    _, error = together({"model": "a"}, {"model": "b"})
    assert "loads {'model': 'b'}, and the first one of this host {'model': 'a'}" in str(error)


def test_a_first_process_that_ends_is_noticed_by_the_others():
    first, other = together({}, {})
    del first
    with pytest.raises(ConfigurationError, match=r"ended while the model was loaded"):
        other.layer(pytest.fail, pytest.fail)


def test_processes_that_never_come_are_an_error(monkeypatch):
    monkeypatch.setattr("kt_kernel.training.host.PATIENCE", 0.1)
    for index in range(2):
        with pytest.raises(ConfigurationError, match=r"only some of the 2 processes"):
            meet(Place(index, 2, f"test-{os.getpid()}-alone-{index}"), {})
