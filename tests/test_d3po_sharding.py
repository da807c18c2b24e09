"""Weights in pieces (FSDP2): two real processes on CPUs, started as a person would start them.

tests/in_pieces.py is what those processes do; here is what one process makes of the same.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_pipelines
import torch
from divided_trainings import Settings, Trainings, both, settings
from safetensors import safe_open
from safetensors.torch import load_file

__all__ = ["settings"]  # a fixture

WORKER = str(Path(__file__).with_name("in_pieces.py"))
FAMILIES = {
    "sdxl": tiny_pipelines.sdxl,
    "sd3": tiny_pipelines.sd3,
    "flux": tiny_pipelines.flux,
}


@pytest.fixture(scope="module")
def two(settings: Settings, tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See `both`."""
    folder = tmp_path_factory.mktemp("two")
    families = [
        str(tiny_pipelines.save(make, folder / "families" / name))
        for name, make in FAMILIES.items()
    ]
    return both(settings, tiny_sd, folder, "fsdp2.yaml", WORKER, 4, families=families)


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


class TestPieces(Trainings):
    """Of every tensor each process has its part."""
