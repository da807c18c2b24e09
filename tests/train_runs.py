"""Real trainings of the command, for the tests of several rooms: started, and killed on the way."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

TRAIN = str(Path(__file__).resolve().parent.parent / "train.py")


def environment(**more: str) -> dict[str, str]:
    """As this process computes: a sum over more threads is another sum."""
    threads = str(torch.get_num_threads())
    return {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, **more}


def train_and_kill(overrides: Sequence[str], folder: Path, first: int, last: int) -> int:
    """Train into `folder` and SIGKILL it at a random line of metrics from first to last; which."""
    moment = random.SystemRandom().randint(first, last)
    metrics = folder / "metrics.jsonl"
    with subprocess.Popen(
        [sys.executable, TRAIN, *overrides],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    ) as process:
        while process.poll() is None:
            if metrics.exists() and metrics.read_bytes().count(b"\n") >= moment:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.002)
        assert process.wait() == -signal.SIGKILL, process.stderr and process.stderr.read()
    return moment
