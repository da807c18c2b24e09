"""Weights in pieces (FSDP2): two real processes on CPUs, started as a person would start them.

tests/in_pieces.py is what those processes do; here is what one process makes of the same.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import divided_trainings as divided
import pytest
import tiny_pipelines
import torch
from divided_trainings import KILLED, TRAININGS, Settings
from safetensors import safe_open
from safetensors.torch import load_file
from train_runs import TRAIN, environment, free_port, launcher, train_and_kill

WORKER = str(Path(__file__).with_name("in_pieces.py"))
FAMILIES = {
    "sdxl": tiny_pipelines.sdxl,
    "sd3": tiny_pipelines.sd3,
    "flux": tiny_pipelines.flux,
}


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
    train_and_kill(killed, folder / "killed", 4, 11, launcher("fsdp2.yaml"))
    assert not (folder / "killed" / "weights").exists()
    plan = {
        "model": str(tiny_sd),
        "families": [
            str(tiny_pipelines.save(make, folder / "families" / name))
            for name, make in FAMILIES.items()
        ],
        "folder": str(folder),
        "trainings": [*(settings(name, folder / name) for name in TRAININGS), killed],
        "ports": [free_port() for _ in range(3 + len(TRAININGS))],
    }
    (folder / "plan.json").write_text(json.dumps(plan))
    ended = subprocess.run(
        [sys.executable, *launcher("fsdp2.yaml"), WORKER, str(folder / "plan.json")],
        capture_output=True,
        text=True,
        env=environment(CUDA_VISIBLE_DEVICES="", PYTHONPATH=str(Path(TRAIN).parent)),
        check=False,
        timeout=600,  # processes that wait for each other wait for ever
    )
    assert ended.returncode == 0, ended.stderr
    return folder


# ---- a policy -----------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["lora", "full", *FAMILIES])
def test_a_policy_in_pieces_is_the_policy(two: Path, policy: str) -> None:
    """In the processes everything else was compared; here the files that they wrote."""
    cut, plain = two / f"{policy}-cut", two / f"{policy}-plain"
    files = sorted(path.relative_to(cut) for path in cut.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(plain) for path in plain.rglob("*") if path.is_file())
    for file in files:
        if file.suffix == ".json":
            assert (cut / file).read_text() == (plain / file).read_text()
            continue
        with safe_open(cut / file, "pt") as one, safe_open(plain / file, "pt") as other:
            assert one.metadata() == other.metadata()
        weights, expected = load_file(cut / file), load_file(plain / file)
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[key], expected[key]) for key in weights)


# ---- trainings ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRAININGS)
def test_two_processes_with_pieces_learn_what_one_learns(
    settings: Settings, two: Path, tmp_path: Path, name: str
) -> None:
    divided.check_learns_what_one_learns(settings, two, tmp_path / "one", name)


def test_ties_and_odd_shares_were_met(two: Path) -> None:
    divided.check_ties_and_odd_shares(two)


def test_a_killed_run_with_pieces_is_the_straight_run(two: Path) -> None:
    divided.check_killed_is_straight(two)


@pytest.mark.parametrize("name", [KILLED, "stored labels, LoRA"])
def test_one_process_goes_on_where_two_were(
    settings: Settings, two: Path, tmp_path: Path, name: str
) -> None:
    divided.check_one_goes_on(settings, two, tmp_path / "one", name)
