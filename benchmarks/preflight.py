"""How far off is `d3po preflight`? Forecast against measurement on the mini model, on a CPU.

    python benchmarks/preflight.py --out FILE

Each setting trains twice in a process of its own, with one update and with five. The longer run's
most resident memory is the peak, libraries included; the difference in CPU seconds is the time of
four updates: with one thread that is what an idle machine takes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from d3po import preflight, recipe
from fifa.config import write_atomic

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs/mini_d3po_incompressibility.yaml"
STEPS = 5
BASE = ["eval.prompts=null", "run.checkpoint_every=0", "run.log_every=100"]
SETTINGS: dict[str, list[str]] = {
    "LoRA, float32": ["run.mixed_precision=no"],
    "LoRA, bfloat16": [],
    "LoRA, float32, twice the groups": [
        "run.mixed_precision=no",
        "optim.micro_batch=8",
        "online.groups=8",
    ],
    "LoRA, float32, checkpointing": [
        "run.mixed_precision=no",
        "optim.gradient_checkpointing=true",
    ],
    "full, float32": ["run.mixed_precision=no", "policy.method=full", "optim.learning_rate=1e-5"],
}


def measured(overrides: Sequence[str]) -> dict[str, float]:
    """Train in a process of its own; its peak and all its CPU seconds."""
    command = [sys.executable, str(ROOT / "train.py"), str(CONFIG), *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
    return {"peak": used.ru_maxrss * 1024.0, "seconds": used.ru_utime + used.ru_stime}


def compared(name: str, overrides: list[str], work: Path, rates: Any) -> dict[str, Any]:
    """Forecast and measurement of one setting; a longer run less a shorter one gives an update."""
    found = {}
    for steps in (1, STEPS):
        folder = work.resolve() / f"{name.replace(' ', '_').replace(',', '')}-{steps}"
        own = [*BASE, *overrides, f"optim.max_steps={steps}", f"run.dir={folder}"]
        found[steps] = measured(own)
    config = recipe.load(CONFIG, own)
    ahead = preflight.forecast(config, "cpu", rates, preflight.own_memory)
    seconds = (found[STEPS]["seconds"] - found[1]["seconds"]) / (STEPS - 1)
    return {
        "setting": name,
        "overrides": overrides,
        "peak_forecast": ahead.peak,
        "peak_measured": found[STEPS]["peak"],
        "seconds_forecast": ahead.seconds_a_step,
        "seconds_measured": seconds,
    }


def main() -> None:
    """Compare all settings, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("runs/preflight"))
    parser.add_argument("--only", nargs="*", default=list(SETTINGS))
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    shutil.rmtree(given.work, ignore_errors=True)
    torch.set_num_threads(1)
    rows = []
    for name in given.only:
        precision = torch.bfloat16 if "bfloat16" in name else torch.float32
        rates = preflight.measured(torch.device("cpu"), precision)
        rows.append(compared(name, SETTINGS[name], given.work, rates))
        row = rows[-1]
        write_atomic(given.out, json.dumps(rows, indent=1) + "\n")
        print(
            f"{name}: peak {row['peak_forecast'] / 1e9:.2f} GB forecast, "
            f"{row['peak_measured'] / 1e9:.2f} measured; an update "
            f"{row['seconds_forecast']:.2f} s forecast, {row['seconds_measured']:.2f} measured",
            flush=True,
        )


if __name__ == "__main__":
    main()
