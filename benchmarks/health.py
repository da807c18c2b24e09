"""Does health.py warn of what is broken, and of nothing else?

    python benchmarks/health.py --out FILE

Ten short healthy runs of the shipped configs, and runs into which a fault was put on purpose. A
fault run stops at its first warning (health.stop=true), which must be one of those expected.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fifa.config import InputError, write_atomic

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).parent.parent
ONLINE, OFFLINE = "mini_d3po_incompressibility", "mini_fifa_dpo"
ALIGNMENT = "mini_d3po_alignment"
STEPS = 40  # updates of a run: two windows
GROUPS = ["online.groups=4", "optim.accumulation=1"]
SHORTER = {ONLINE: [], OFFLINE: [], ALIGNMENT: GROUPS}
EVAL = ["eval.count=24", "eval.images=2", "eval.every=20", "eval.grid_prompts=0"]
EVAL += ["run.log_every=1000", "run.checkpoint_every=10"]


@dataclass(frozen=True)
class Trial:
    """One run: its config, its overrides, and the checks that may fire in it."""

    name: str
    config: str
    overrides: Sequence[str]
    expected: tuple[str, ...] = ()  # empty: none may


class Brightness:
    """A reward that only likes brightness."""

    name, differentiable = "brightness", False

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Mean of all pixels."""
        return images.mean((1, 2, 3)).float()


def healthy(kept: Path) -> Iterator[Trial]:
    """Ten runs as the configs say, shorter."""
    # the threshold of `tone` was set after seeds 0 and 1 of alignment had been seen
    for config, seeds in {ONLINE: range(4), OFFLINE: range(4), ALIGNMENT: range(2, 4)}.items():
        for seed in seeds:
            own = [f"offline.data={kept}", "offline.held_out_fraction=0.2"]
            more = [*(own if config == OFFLINE else []), f"run.seed={seed}", f"policy.seed={seed}"]
            yield Trial(f"{config}-{seed}", config, more)


def faults(kept: Path, folder: Path) -> Iterator[Trial]:
    """What was broken on purpose, and the warnings that name it."""
    stop = "health.stop=true"
    own = [f"offline.data={kept}", stop]
    runs_away = ("sinking", "gradient", "runaway", "clipped", "nan")
    yield Trial(
        "NaN latents",
        ONLINE,
        [f"model={broken_model(folder)}", stop, "eval.prompts=null"],
        ("nan",),
    )
    yield Trial("learning rate x500, online", ONLINE, ["optim.learning_rate=1", stop], runs_away)
    yield Trial(
        "learning rate x500, offline", OFFLINE, ["optim.learning_rate=2.5e-3", *own], runs_away
    )
    judged = ["online.judges=[health:Brightness]", "eval.judges=[health:Brightness,oracle]"]
    yield Trial("a reward that only likes brightness", ONLINE, [*judged, stop], ("shortcut",))
    wrong = exchanged(kept, folder / "exchanged.parquet")
    yield Trial("wrong-sign labels", OFFLINE, [f"offline.data={wrong}", stop], ("labels",))
    # without another judge at hand only the pictures tell
    blind = [f"offline.data={wrong}", "optim.learning_rate=3e-5", "health.pairs=0", stop]
    yield Trial(
        "wrong-sign labels, not compared at the start", OFFLINE, blind, ("worse", "by heart")
    )


def broken_model(folder: Path) -> Path:
    """The mini model with one weight of its UNet that is not a number."""
    import torch
    from diffusers import StableDiffusionPipeline

    from d3po.families import MINI

    out = folder / "broken"
    if not out.exists():
        pipe = StableDiffusionPipeline.from_pretrained(MINI)
        with torch.no_grad():
            pipe.unet.conv_out.bias[0] = torch.nan
        pipe.save_pretrained(out)
    return out


def exchanged(kept: Path, out: Path) -> Path:
    """The same pairs with winner and loser exchanged."""
    import pyarrow.parquet as pq

    table = pq.read_table(kept)
    names = {"label_0": "label_1", "label_1": "label_0"}
    pq.write_table(table.rename_columns([names.get(n, n) for n in table.column_names]), out)
    return out


def run(trial: Trial, folder: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Train; what was warned of."""
    from d3po import recipe

    out, start = folder / trial.name.replace(" ", "_").replace(",", ""), time.process_time()
    own = [
        f"run.dir={out}",
        *_own_cache(trial.config, out),
        f"optim.max_steps={STEPS}",
        *SHORTER[trial.config],
        *EVAL,
    ]
    config = recipe.load(
        ROOT / f"configs/{trial.config}.yaml", [*own, *trial.overrides, *overrides]
    )
    with open(os.devnull, "w") as nobody, redirect_stdout(nobody):
        try:
            recipe.train(config)
        except InputError as error:
            if "health.stop" not in str(error):
                raise
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    kept = ("step", "check", "words")
    told = [{key: row[key] for key in kept} for row in rows if row["kind"] == "health"]
    print(f"{trial.name}: {[(row['step'], row['check']) for row in told]}", flush=True)
    return {
        "name": trial.name,
        "config": trial.config,
        "overrides": [text for text in trial.overrides if str(folder.parent) not in text],
        "updates": sum(row["kind"] == "update" for row in rows),
        "cpu_minutes": round((time.process_time() - start) / 60, 2),
        "as_expected": told[0]["check"] in trial.expected if told else not trial.expected,
        "warnings": told,
    }


def _own_cache(config: str, out: Path) -> list[str]:
    """Runs at one time must not encode the same pairs into the same folder."""
    return [f"offline.cache={out}-cache"] if config == OFFLINE else []


def pairs(folder: Path) -> Path:
    """180 pairs that FiFA keeps of 6,000 noisy ones."""
    world, scored = folder / "pairs", folder / "fifa"
    if not (scored / "kept.parquet").exists():
        own = [sys.executable, "-m", "fifa.cli"]
        for command in (
            ["world", "--rows", "6000", "--out", str(world)],
            ["score", str(world), "--out", str(scored)],
            ["select", str(scored), "-k", "3%"],
        ):
            subprocess.run([*own, *command], check=True, cwd=ROOT)
    return scored / "kept.parquet"


def main() -> None:
    """Train all, count, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("overrides", nargs="*", help="key=value for every run")
    parser.add_argument("--work", type=Path, default=Path("runs/health"))
    parser.add_argument("--parallel", type=int, default=2, help="runs at one time")
    parser.add_argument("--only", choices=("faults", "healthy"), default=None)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    work = given.work.resolve()
    kept = pairs(work)
    shutil.rmtree(work / "runs", ignore_errors=True)
    trials = {"faults": list(faults(kept, work)), "healthy": list(healthy(kept))}
    if given.only:
        trials = {given.only: trials[given.only]}
    result: dict[str, list[Any]] = {kind: [] for kind in trials}
    with ProcessPoolExecutor(given.parallel, multiprocessing.get_context("spawn")) as pool:
        jobs = {
            pool.submit(run, trial, work / "runs", given.overrides): kind
            for kind, own in trials.items()
            for trial in own
        }
        for job in as_completed(jobs):
            result[jobs[job]].append(job.result())
            write_atomic(given.out, json.dumps(result, indent=1) + "\n")
    for kind, own in result.items():
        print(f"{kind}: {sum(row['as_expected'] for row in own)} of {len(own)} as expected")


if __name__ == "__main__":
    main()
