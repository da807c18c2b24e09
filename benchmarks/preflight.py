"""How far off is `d3po preflight`? Forecast against measurement on the mini model, on a CPU.

    python benchmarks/preflight.py --out FILE

Each setting trains in a forked child of its own, which reports the most memory that it held
(ru_maxrss, in which the parent's libraries are counted as in any training) and the CPU seconds of
one update more. One thread: CPU seconds are then what an idle machine takes.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch

from d3po import preflight, recipe
from fifa.config import write_atomic

ROOT = Path(__file__).parent.parent
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


def measured(config: recipe.TrainConfig) -> dict[str, float]:
    """Train in this process; its peak and the CPU seconds of an update."""
    start = time.process_time()
    with open(os.devnull, "w") as nobody, redirect_stdout(nobody):
        recipe.train(config)
    seconds = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"peak": float(peak), "seconds": seconds}


def compared(name: str, overrides: list[str], work: Path, rates: Any) -> dict[str, Any]:
    """Forecast and measurement of one setting; a longer run less a shorter one gives an update."""
    found = {}
    for steps in (1, STEPS):
        folder = work / f"{name.replace(' ', '_').replace(',', '')}-{steps}"
        own = [*BASE, *overrides, f"optim.max_steps={steps}", f"run.dir={folder}"]
        config = recipe.load(ROOT / "configs/mini_d3po_incompressibility.yaml", own)
        with multiprocessing.get_context("fork").Pool(1) as pool:
            found[steps] = pool.apply(measured, (config,))
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
