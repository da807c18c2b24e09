"""Gradients in pieces (DeepSpeed's ZeRO-2): two real processes on CPUs.

tests/with_zero.py is what those processes do; here is what one process makes of the same.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from divided_trainings import Settings, Trainings, both, settings

__all__ = ["settings"]  # a fixture

WORKER = str(Path(__file__).with_name("with_zero.py"))


@pytest.fixture(scope="module")
def two(settings: Settings, tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See `both`."""
    folder = tmp_path_factory.mktemp("two")
    return both(settings, tiny_sd, folder, "deepspeed_zero2.yaml", WORKER, 6)


class TestZero(Trainings):
    """Of gradients and moments each process has its part."""
