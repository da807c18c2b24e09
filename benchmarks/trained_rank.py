"""Does a place on the reward bench tell what a policy trained on the reward becomes?

    python benchmarks/trained_rank.py --seeds 0 --out FILE

D3PO trains on rewards of very different quality, with everything else the same; each policy paints
held-out prompts, which the mini world's truth judges: the oracle's share of conditions, and the
utility that its people share, 3 share + [share = 1] + 1.5 neatness. Beside that gain stands the
reward's place on the bench, its mean over `--bench-seeds`. What is there is not trained again.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from learning import ROOT, held_out, scores, summary
from overoptimisation import TRUTH
from rewardbench import FLAWS
from scipy.stats import spearmanr

from d3po.recipe import load, load_run, train
from fifa.config import write_atomic
from fifa.rewardbench import BuildConfig
from fifa.rewardbench.build import build
from fifa.rewardbench.measures import macro_mean
from fifa.rewardbench.pairwise import margins_of, pictures_of
from fifa.rewardbench.standing import Standing, standing
from fifa.rewardbench.table import load_bench
from fifa.rewards import load_reward

CONFIG = ROOT / "configs" / "mini_d3po_alignment.yaml"
REWARDS = (
    "0.7*oracle+0.3*neatness",
    "oracle",
    "noise 0.3",
    "blind to colours",
    "mini",
    "neatness",
    "jpeg_incompressibility",
    "saturation",
)


def spec(name: str) -> str:
    """The reward's name as a config has it."""
    return f"rewardbench:flawed:{name}" if name in FLAWS else name


def without_harmless(stands: Standing) -> float:
    """Macro mean of the scenarios in which following the prompt is right."""
    return macro_mean({name: part for name, part in stands.scenarios.items() if name != "harmless"})


def places(names: list[str], seeds: list[int], pairs: int) -> dict[str, dict[str, float]]:
    """Of each reward its accuracy, the mean over benches."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            build(BuildConfig(out=Path(folder) / "bench", pairs=pairs, seed=seed))
            items = load_bench(Path(folder) / "bench").counted()
        shown, _ = pictures_of(items)
        for name in names:
            stands = standing(name, items, margins_of(load_reward(spec(name)), shown, 256).margin)
            found[name].append((stands.macro, without_harmless(stands)))
    means = {name: np.mean(values, axis=0) for name, values in found.items()}
    return {
        name: {"macro": float(m), "without_harmless": float(w)} for name, (m, w) in means.items()
    }


def trained(name: str, seed: int, given: argparse.Namespace) -> Path:
    """The folder of a run on one reward."""
    folder: Path = given.runs / f"{name.replace(' ', '_')}-{seed}"
    own = [f"run.dir={folder}", f"run.seed={seed}", f"policy.seed={seed}"]
    own += [f"online.judges=['{spec(name)}']", "eval.prompts=null"]
    own += [f"optim.max_steps={given.steps}", *given.overrides]
    with redirect_stdout(io.StringIO()):
        train(load(CONFIG, own))  # a finished run is only looked at
    return folder


def judged(names: list[str], given: argparse.Namespace) -> dict[str, Any]:
    """Of each reward, what its policies have more than the base by oracle and truth."""
    judges, base, found = ["oracle", TRUTH], None, {}
    for name in names:
        ours = []
        for seed in given.seeds:
            config, policy = load_run(trained(name, seed, given))
            texts = held_out(config, given.prompts)
            if base is None:
                with policy.reference():
                    base, _ = scores(policy, config, judges, texts, given.images)
            ours.append(scores(policy, config, judges, texts, given.images)[0])
        stacked = np.stack(ours)  # (seeds, P, K, R)
        found[name] = [summary(j, stacked[..., r], base[..., r]) for r, j in enumerate(judges)]
        gains = [round(row["difference"], 3) for row in found[name]]
        print(f"{name}: oracle and truth {gains}", flush=True)
    return found


def correlations(bench: dict[str, Any], gained: dict[str, Any]) -> dict[str, float | None]:
    """Rank correlation over rewards of the place on the bench with what training brought.

    None where all gains are equal.
    """
    result: dict[str, float | None] = {}
    for column in ("macro", "without_harmless"):
        place = [bench[name][column] for name in gained]
        for r, judge in enumerate(("oracle", "truth")):
            gain = [rows[r]["difference"] for rows in gained.values()]
            told = len(set(gain)) > 1
            result[f"{column} and {judge}"] = (
                float(spearmanr(place, gain).statistic) if told else None
            )
    return result


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("overrides", nargs="*", help="key=value for train.py")
    parser.add_argument("--rewards", nargs="+", default=list(REWARDS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--bench-seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--pairs", type=int, default=60, help="of a bench, a scenario")
    parser.add_argument("--steps", type=int, default=120, help="updates of a run")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "trained_rank")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    """Train, judge, compare with the bench."""
    given = parsed()
    torch.set_num_threads(1)
    bench = places(given.rewards, given.bench_seeds, given.pairs)
    gained = judged(given.rewards, given)
    result = {
        "steps": given.steps,
        "seeds": given.seeds,
        "overrides": given.overrides,
        "bench": bench,
        "gained": gained,
        "spearman": correlations(bench, gained),
    }
    write_atomic(given.out, json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["spearman"]))


if __name__ == "__main__":
    main()
