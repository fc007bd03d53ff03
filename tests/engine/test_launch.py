"""Who a process is, by the environment that launchers make."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest

from vitdense.engine import launch
from vitdense.engine.launch import Launch, first_host, read_launch, share_of_cores

TORCHRUN = {"WORLD_SIZE": "8", "RANK": "5", "LOCAL_RANK": "1", "MASTER_ADDR": "a"}
SLURM = {
    "SLURM_JOB_ID": "70123",
    "SLURM_STEP_ID": "2",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "4",
    "SLURM_NODELIST": "gpu[07-08]",
}


def test_without_a_launcher_there_is_one_process() -> None:
    assert read_launch({}) == read_launch({"WORLD_SIZE": "1"}) == Launch(0, 0, 1)


def test_torchrun() -> None:
    assert read_launch(TORCHRUN) == Launch(5, 1, 8)
    assert read_launch(SLURM | TORCHRUN) == Launch(5, 1, 8)  # one torchrun for each machine


def test_srun() -> None:
    found = read_launch(SLURM)
    assert (found.rank, found.local_rank, found.world_size) == (3, 1, 4)
    assert found.meeting is not None and found.meeting.startswith("tcp://gpu07:")
    port = int(found.meeting.rpartition(":")[2])
    assert 15000 <= port < 55000
    other = read_launch(SLURM | {"SLURM_JOB_ID": "70124", "SLURM_PROCID": "0"})
    assert other.meeting != found.meeting
    told = {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "29500"}
    assert read_launch(SLURM | told).meeting == "tcp://10.0.0.7:29500"
    assert read_launch(SLURM | {"SLURM_STEP_NUM_TASKS": "2"}).world_size == 2


def test_cores_are_shared_by_those_that_run_on_them() -> None:
    """Bound by the launcher or not, on one machine or several."""
    every = set(range(16))
    free = [("a", every)] * 4 + [("b", every)] * 2
    assert [share_of_cores(rank, free) for rank in (0, 3, 4)] == [4, 4, 8]
    bound = [("a", set(range(4 * it, 4 * it + 4))) for it in range(4)]
    assert [share_of_cores(rank, bound) for rank in range(4)] == [4] * 4
    assert share_of_cores(0, [("a", {0})] * 3) == 1
    assert share_of_cores(1, [("a", {0, 1}), ("b", {0, 1})]) == 2


def test_what_srun_has_not_started_runs_once() -> None:
    batch = {name: value for name, value in SLURM.items() if name != "SLURM_STEP_ID"}
    shell = SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}
    assert read_launch(batch) == read_launch(shell) == Launch()


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"WORLD_SIZE": "2"}, "^environment: RANK is missing; start several processes by torchrun"),
        ({"WORLD_SIZE": "two"}, "^environment: WORLD_SIZE is 'two'; "),
        ({**SLURM, "SLURM_LOCALID": ""}, "^environment: SLURM_LOCALID is ''; "),
    ],
)
def test_faulty_environments_are_named(env: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_launch(env)


@pytest.mark.parametrize(
    ("names", "first"),
    [
        ("gpu1", "gpu1"),
        ("gpu1,gpu2", "gpu1"),
        ("gpu[003-007,9]", "gpu003"),
        ("gpu[12,14-15],cpu1", "gpu12"),
        ("rack-2-gpu[1-4]-ib", "rack-2-gpu1-ib"),
        ("node-a.example.org", "node-a.example.org"),
    ],
)
def test_the_first_machine_of_a_list(names: str, first: str) -> None:
    assert first_host(names) == first


def test_other_lists_are_scontrols(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        assert command == ["scontrol", "show", "hostnames", "r[1-2]n[3-4]"]
        return subprocess.CompletedProcess(command, 0, "r1n3\nr1n4\n", "")

    with pytest.raises(
        ValueError, match=r"^environment: 'r\[1-2\]n\[3-4\]' names no .*MASTER_ADDR"
    ):
        first_host("r[1-2]n[3-4]")
    monkeypatch.setattr(launch.subprocess, "run", answer)
    assert first_host("r[1-2]n[3-4]") == "r1n3"
