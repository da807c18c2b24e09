"""Gradients in pieces (DeepSpeed's ZeRO-2): two real processes on CPUs.

tests/with_zero.py is what those processes do; here is what one process makes of the same.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import divided_trainings as divided
import pytest
from divided_trainings import KILLED, TRAININGS, Settings
from train_runs import TRAIN, environment, free_port, launcher, train_and_kill

WORKER = str(Path(__file__).with_name("with_zero.py"))
FILE = "deepspeed_zero2.yaml"


@pytest.fixture(scope="module")
def settings(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    stored = tmp_path_factory.mktemp("stored")
    divided.store(stored)
    return divided.settings_of(tiny_sd, stored)


@pytest.fixture(scope="module")
def two(settings: Settings, tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what two processes did: a training each in a folder of its name, and "killed".

    That one was begun by the command that people type, killed, and taken up again with the others.
    """
    folder = tmp_path_factory.mktemp("two")
    killed = settings(KILLED, folder / "killed")
    train_and_kill(killed, folder / "killed", 6, 11, launcher(FILE))
    assert not (folder / "killed" / "weights").exists()
    plan = {
        "model": str(tiny_sd),
        "folder": str(folder),
        "ports": [free_port() for _ in range(3 + len(TRAININGS))],
        "trainings": [*(settings(name, folder / name) for name in TRAININGS), killed],
    }
    (folder / "plan.json").write_text(json.dumps(plan))
    path = os.pathsep.join([str(Path(TRAIN).parent), os.environ.get("PYTHONPATH", "")])
    ended = subprocess.run(
        [sys.executable, *launcher(FILE), WORKER, str(folder / "plan.json")],
        capture_output=True,
        text=True,
        env=environment(CUDA_VISIBLE_DEVICES="", PYTHONPATH=path),
        check=False,
        timeout=600,  # processes that wait for each other wait for ever
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return folder


@pytest.mark.parametrize("name", TRAININGS)
def test_two_processes_learn_what_one_learns(
    settings: Settings, two: Path, tmp_path: Path, name: str
) -> None:
    divided.check_learns_what_one_learns(settings, two, tmp_path / "one", name)


def test_ties_and_odd_shares_were_met(two: Path) -> None:
    divided.check_ties_and_odd_shares(two)


def test_a_killed_run_is_the_straight_run(two: Path) -> None:
    divided.check_killed_is_straight(two)


@pytest.mark.parametrize("name", [KILLED, "stored labels, LoRA"])
def test_one_process_goes_on_where_two_were(
    settings: Settings, two: Path, tmp_path: Path, name: str
) -> None:
    divided.check_one_goes_on(settings, two, tmp_path / "one", name)
