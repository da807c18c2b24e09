"""Does it learn? Trains a config with several seeds and compares each policy with the base.

    python benchmarks/learning.py configs/mini_d3po_compressibility.yaml --seeds 0 1 2 --out FILE

Held-out prompts, equal noise for policy and base, the judge trained on first and others after it.
The interval over runs resamples prompts, and runs as wholes (a hierarchical bootstrap): it covers
both what another seed of training and what other prompts would have given.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from d3po.evaluate import PromptResult, measure
from d3po.policy import Policy
from d3po.recipe import evaluation_prompts, load_run
from fifa.config import write_atomic
from fifa.rewards import load_reward

ROOT = Path(__file__).parent.parent
RESAMPLES = 4000


def train(config: Path, folder: Path, seed: int, overrides: list[str]) -> float:
    """One run in a process of its own; minutes it took (0 if it was finished before)."""
    start = time.monotonic()
    command = [sys.executable, str(ROOT / "train.py"), str(config)]
    command += [f"run.dir={folder}", f"run.seed={seed}", f"policy.seed={seed}"]
    command += ["eval.prompts=null", *overrides]
    # One thread a process beats two for nets this small.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL, env=environment)
    return (time.monotonic() - start) / 60


def held_out(config: Any, prompts: int, seed: int = 99) -> list[str]:
    """Prompts of the mini world that nobody trains on; 99: those that all comparisons share."""
    asked = {"prompts": "miniworld:heldout", "count": prompts, "seed": seed}
    eval_config = config.eval.model_copy(update=asked)
    return evaluation_prompts(config.model_copy(update={"eval": eval_config}))


def scores(policy: Policy, config: Any, judges: list[str], texts: list[str], images: int) -> Any:
    """Scores (P, K, R) under the weights that are in place."""
    rewards = [load_reward(name) for name in judges]
    found: list[PromptResult] = measure(
        policy.family, policy.bare, config.sampler, rewards, texts, images, seed=4321
    )
    return np.stack([result.scores for result in found]), float(
        np.mean([result.pixel_distance for result in found])
    )


def interval(differences: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95% interval of the mean of (runs, prompts), resampling both."""
    rng = np.random.default_rng(seed)
    runs, prompts = differences.shape
    means = [
        differences[rng.integers(runs, size=runs)][:, rng.integers(prompts, size=prompts)].mean()
        for _ in range(RESAMPLES)
    ]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def summary(name: str, ours: np.ndarray, base: np.ndarray) -> dict[str, Any]:
    """One judge: scores (runs, P, K) of the policies and (P, K) of the base."""
    difference = ours - base
    wins, losses = int((difference > 0).sum()), int((difference < 0).sum())
    low, high = interval(difference.mean(2))
    return {
        "judge": name,
        "base": float(base.mean()),
        "policy": float(ours.mean()),
        "policy_by_run": ours.mean((1, 2)).tolist(),
        "difference": float(difference.mean()),
        "difference_interval": [low, high],
        "wins": wins,
        "losses": losses,
        "ties": int((difference == 0).sum()),
        "win_rate": wins / (wins + losses) if wins + losses else None,
    }


def main() -> None:
    """Train, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", help="key=value for train.py")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--judges", default=None, help="comma-separated; default: the config's")
    parser.add_argument("--runs", type=Path, default=Path("runs/learning"))
    parser.add_argument("--name", default=None, help="default: the config's name")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    name = given.name or given.config.stem
    minutes, all_scores, diversity, base, base_diversity = [], [], [], None, 0.0
    for seed in given.seeds:
        folder = given.runs / f"{name}-{seed}"
        minutes.append(train(given.config, folder, seed, given.overrides))
        config, policy = load_run(folder)
        judges = given.judges.split(",") if given.judges else list(config.eval.judges)
        texts = held_out(config, given.prompts)
        if base is None:
            with policy.reference():
                base, base_diversity = scores(policy, config, judges, texts, given.images)
        with policy.averaged():
            ours, spread = scores(policy, config, judges, texts, given.images)
        all_scores.append(ours)
        diversity.append(spread)
        print(f"{name} seed {seed}: {minutes[-1]:.1f} min", flush=True)
    stacked = np.stack(all_scores)  # (runs, P, K, R)
    result = {
        "config": str(given.config),
        "overrides": given.overrides,
        "seeds": given.seeds,
        "prompts": given.prompts,
        "images_a_prompt": given.images,
        "minutes_a_run": [round(m, 2) for m in minutes],
        "judges": [summary(j, stacked[..., r], base[..., r]) for r, j in enumerate(judges)],
        "pixel_diversity": {"base": base_diversity, "policy_by_run": diversity},
        "scores_by_prompt": {
            "base": base.mean(1).round(5).tolist(),
            "policy": stacked.mean(2).round(5).tolist(),
        },
    }
    write_atomic(given.out, json.dumps(result, indent=1) + "\n")
    for judge in result["judges"]:
        low, high = judge["difference_interval"]
        print(
            f"{name}: {judge['judge']}: base {judge['base']:.4f}, policy {judge['policy']:.4f}, "
            f"difference {judge['difference']:+.4f} [{low:+.4f}, {high:+.4f}]"
        )


if __name__ == "__main__":
    main()
