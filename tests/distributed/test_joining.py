"""Who is one of several processes, who is not, and what is said to flags and files that do not fit."""

import dataclasses
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from kdjax import loop
from kdjax.checkpoint import by_first, require_same, require_shared
from kdjax.config import Experiment, Mesh
from launch import processes

ROOT = pathlib.Path(__file__).parents[2]
SLURM = dict.fromkeys(processes.SLURM, "1")
BY_HAND = {"coordinator": "10.0.0.1:1234", "processes": 2, "process": 1}


def settings(environment=(), chips=False, asked=lambda: pytest.fail("slow"), **given):
    return processes.settings(dict.fromkeys(processes.NAMES) | given, dict(environment), chips, asked)


def test_by_hand():
    who = {"coordinator_address": "10.0.0.1:1234", "num_processes": 2, "process_id": 1}
    expected = who | {"cluster_detection_method": "deactivate"}
    assert settings(**BY_HAND) == expected
    assert settings(SLURM, chips=True, **BY_HAND) == expected  # what is typed counts
    assert settings(**BY_HAND | {"coordinator": "[::1]:80"})["coordinator_address"] == "[::1]:80"


@pytest.mark.parametrize(
    ("environment", "chips", "alone"),
    [
        ({}, False, True),
        (SLURM, False, True),  # one task
        (SLURM | {"SLURM_NTASKS": "8"}, False, False),
        ({"SLURM_JOB_ID": "3", "SLURM_NTASKS": "8"}, False, True),  # a batch script, not srun
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, False, True),  # a copied environment, but no TPU
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, True, True),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, True, False),
        ({"TPU_PROCESS_ADDRESSES": "a:1,b:1"}, True, False),
        ({"TPU_SKIP_MDS_QUERY": "1"}, True, True),
    ],
)
def test_by_what_the_machine_says(environment, chips, alone):
    assert settings(environment, chips) == (None if alone else {})
    assert settings(environment, chips, processes=1) is None


@pytest.mark.parametrize("answer", [True, False])
def test_a_machine_with_tpus_is_asked_if_nothing_else_says(answer):
    assert settings(chips=True, asked=lambda: answer) == ({} if answer else None)


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"processes": 2}, "must be set together, got no --coordinator and --process. Set --coordinator to host:port"),
        ({"process": 1}, "got no --coordinator and --processes"),
        (BY_HAND | {"process": None}, "got no --process. "),
        (BY_HAND | {"coordinator": "10.0.0.1"}, r"--coordinator must be host:port of process 0, got '10.0.0.1'"),
        (BY_HAND | {"coordinator": "http://a:1"}, "--coordinator must be host:port of process 0, got 'http"),
        (BY_HAND | {"process": 2}, r"--process must be in 0..1 with --processes=2, got 2; every process has a number"),
        (BY_HAND | {"process": -1}, r"--process must be in 0..1 with --processes=2, got -1"),
        (BY_HAND | {"processes": 0}, r"--process must be in 0..0 with --processes=0, got 1"),
    ],
)
def test_flags_that_do_not_fit(given, complaint):
    with pytest.raises(ValueError, match=complaint):
        settings(**given)


def command(*flags):
    config = ["--config=configs/quickstart.py", "--workdir=nowhere"]
    typed = [sys.executable, "-m", "launch.train", *config, *flags]
    return subprocess.run(typed, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)


def test_a_port_that_is_taken_is_said_before_anything_slow():
    with socket.create_server(("", 0)) as listening:
        port = listening.getsockname()[1]
        done = command(f"--coordinator=localhost:{port}", "--processes=2", "--process=0")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: --coordinator must name a free port of this host, got 'localhost:{port}'; ")
    assert not (ROOT / "nowhere").exists()


def test_processes_that_do_not_come_are_said_with_the_flags_to_look_at():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    done = command(f"--coordinator=127.0.0.1:{port}", "--processes=2", "--process=1", "--wait_seconds=1")
    assert done.returncode == processes.LOST
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: the processes did not find each other within 1 s, with --coordinator=127.0.0.1:")
    assert "the same --processes and a --process of its own" in last


# --- what is checked once they are together; here the others are made up


@pytest.fixture
def three(monkeypatch):
    """three(change): process_allgather of three processes, of which `change` makes the last two."""
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(multihost_utils, "sync_global_devices", lambda name: None)
    monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", lambda value: value)

    def others(change):
        monkeypatch.setattr(
            multihost_utils, "process_allgather", lambda array: np.stack([array, *change(np.asarray(array))])
        )

    return others


def test_another_config_or_text_in_some_process_is_an_error(three):
    three(lambda digest: (digest, digest))
    require_same("a", "config")
    three(lambda digest: (digest, digest + 1))
    with pytest.raises(ValueError, match="config must be the same in all processes, .* in process 2; they"):
        require_same("a", "config")


def test_a_workdir_that_some_process_does_not_see_is_an_error(three, tmp_path):
    three(lambda seen: (seen, seen))
    require_shared(tmp_path)
    three(lambda seen: (~seen, seen))
    with pytest.raises(ValueError, match=r"--workdir must be one directory .* in which process 1 does not find"):
        require_shared(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_the_first_process_finds_or_fails_with_is_told(three, monkeypatch):
    told = []
    three(None)
    monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", lambda value: told.append(np.array(value)) or value)
    assert by_first(lambda: [{"a": 1.5}, None, "\u00fc"]) == [{"a": 1.5}, None, "\u00fc"]

    def fail():
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="^the disk is full$"):
        by_first(fail)
    monkeypatch.setattr(jax, "process_index", lambda: 2)
    answers = iter(told)
    monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", lambda value: next(answers))
    other = lambda: pytest.fail("process 0 alone does it")  # noqa: E731
    assert by_first(other) == [{"a": 1.5}, None, "\u00fc"]
    with pytest.raises(ValueError, match="^the disk is full$"):
        by_first(other)
    assert next(answers, None) is None


def test_several_processes_need_a_mesh(three, tmp_path):
    three(lambda array: (array, array))
    with pytest.raises(ValueError, match=r"mesh\.preset must spread a run over its 3 processes, got 'single'"):
        loop.claim_workdir(tmp_path, Experiment())
    loop.claim_workdir(tmp_path, dataclasses.replace(Experiment(), mesh=Mesh(preset="fsdp")))
