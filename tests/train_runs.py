"""Real trainings of the command, for the tests of several rooms: started, and killed on the way."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch

TRAIN = str(Path(__file__).resolve().parent.parent / "train.py")


def environment(**more: str) -> dict[str, str]:
    """As this process computes: a sum over more threads is another sum."""
    threads = str(torch.get_num_threads())
    return {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, **more}


def launcher(file: str) -> list[str]:
    """The arguments of Python that start two CPU processes as configs/accelerate/<file> says."""
    config = str(Path(TRAIN).parent / "configs" / "accelerate" / file)
    launch = ["-m", "accelerate.commands.launch", "--config_file", config, "--num_processes=2"]
    return [*launch, f"--main_process_port={free_port()}"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def train_and_kill(
    overrides: Sequence[str], folder: Path, first: int, last: int, launch: Sequence[str] = ()
) -> int:
    """Train into `folder` and SIGKILL it at a random line of metrics from first to last; which."""
    moment = random.SystemRandom().randint(first, last)
    metrics = folder / "metrics.jsonl"
    with subprocess.Popen(
        [sys.executable, *launch, TRAIN, *overrides],
        env=environment(CUDA_VISIBLE_DEVICES=""),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    ) as process:
        while process.poll() is None:
            if metrics.exists() and metrics.read_bytes().count(b"\n") >= moment:
                kill(process)
                break
            time.sleep(0.002)
        assert process.wait() == -signal.SIGKILL, process.stderr and process.stderr.read()
    return moment


def kill(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL a process and those that it started."""
    started = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    for child in started:
        child.kill()
    psutil.wait_procs(started)
