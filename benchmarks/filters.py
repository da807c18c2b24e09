"""Does the filter pay? Diffusion-DPO on what each method keeps, at equal optimizer steps.

    python benchmarks/filters.py --keep 0.5% --seeds 0 1 2 --out FILE

One data set of the mini world is scored once. Each arm keeps the same number of its pairs by
another method (`full` keeps all), trains `configs/mini_fifa_dpo.yaml` on them with each seed, and
paints the same held-out prompts from the same noise. The first arm is compared with the base model
and with each other arm. A seed is another LoRA initialisation, another order of the pairs, other
noise and, for `random`, other pairs. Intervals resample runs and prompts (see learning.py).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from learning import ROOT, scores, summary, train

from d3po.evaluate import EvalConfig
from d3po.recipe import evaluation_prompts, load, load_run
from fifa.config import write_atomic
from fifa.filtering import KEPT, SelectConfig, select
from fifa.miniworld.dataset import write_dataset
from fifa.pairs import PairTable
from fifa.scoring import ScoreConfig, score

CONFIG = ROOT / "configs" / "mini_fifa_dpo.yaml"
FULL = "full"


def kept(arm: str, work: Path, keep: str, seed: int, more: list[str]) -> Path:
    """The pairs that one arm trains on with one seed; made if they are not there yet."""
    if arm == FULL:
        return work / "pairs"
    folder = work / "kept" / f"{arm}-{keep}-{seed if arm == 'random' else 'any'}"
    if not (folder / KEPT).is_file():
        given: dict[str, Any] = dict(pair.split("=", 1) for pair in more)
        given |= {"scores": work / "scores", "out": folder, "k": keep, "method": arm}
        select(SelectConfig(**given, seed=seed))
    return folder / KEPT


def truth(data: Path) -> float:
    """Share of the strict labels that agree with the hidden utility, which no filter sees."""
    import pyarrow.parquet as pq

    columns = ["label_0", "truth_utility_0", "truth_utility_1"]
    table = pq.read_table(data, columns=columns)
    label, first, second = (table[name].to_numpy() for name in columns)
    strict = label != 0.5
    return float(((label > 0.5) == (first > second))[strict].mean())


def train_in_turn(arms: list[str], given: argparse.Namespace) -> dict[tuple[str, int], float]:
    """Train every arm with every seed; minutes of each run."""
    minutes = {}
    for seed in given.seeds:
        for arm in arms:
            data = kept(arm, given.work, given.keep, seed, given.select)
            folder = given.work / "runs" / f"{arm}-{given.keep}-{seed}"
            own = [f"offline.data={data}", f"offline.cache={given.work / 'cache'}"]
            minutes[arm, seed] = train(CONFIG, folder, seed, [*own, *given.overrides])
            print(f"{arm}, seed {seed}: {minutes[arm, seed]:.1f} min", flush=True)
    return minutes


def painted(arms: list[str], given: argparse.Namespace) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Scores of the base (P, K, R), and of each arm (runs, P, K, R), on the same prompts."""
    judges = given.judges.split(",")
    asked = EvalConfig(prompts="miniworld:heldout", count=given.prompts, seed=99)
    texts = evaluation_prompts(load(CONFIG).model_copy(update={"eval": asked}))
    base, found = None, {}
    for arm in arms:
        rows = []
        for seed in given.seeds:
            config, policy = load_run(given.work / "runs" / f"{arm}-{given.keep}-{seed}")
            if base is None:
                with policy.reference():
                    base, _ = scores(policy, config, judges, texts, given.images)
            with policy.averaged():
                rows.append(scores(policy, config, judges, texts, given.images)[0])
        found[arm] = np.stack(rows)
    assert base is not None
    return base, found


def comparisons(arms: list[str], judges: list[str], base: Any, found: Any) -> dict[str, Any]:
    """Every arm against the base, and the first arm against the others, by every judge."""
    first, *others = arms
    sides = {f"{arm} - base": (found[arm], base[None]) for arm in arms}
    sides |= {f"{first} - {other}": (found[first], found[other]) for other in others}
    return {
        title: [summary(j, ours[..., r], theirs[..., r]) for r, j in enumerate(judges)]
        for title, (ours, theirs) in sides.items()
    }


def main() -> None:
    """Make the data, filter, train, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("overrides", nargs="*", help="key=value for train.py")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--data-seed", type=int, default=0, help="another one: other pairs")
    parser.add_argument("--keep", default="0.5%")
    parser.add_argument("--select", nargs="*", default=[], help="key=value for fifa select")
    parser.add_argument("--arms", nargs="+", default=["importance", "random", FULL])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--judges", default="oracle,oracle_strict,mini,neatness")
    parser.add_argument("--work", type=Path, default=Path("runs/filters"))
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    write_dataset(given.work / "pairs", given.rows, given.data_seed)
    score(ScoreConfig(data=given.work / "pairs", out=given.work / "scores"))
    minutes = train_in_turn(given.arms, given)
    base, found = painted(given.arms, given)
    sets = {
        arm: kept(arm, given.work, given.keep, given.seeds[0], given.select) for arm in given.arms
    }
    result = {
        "data_seed": given.data_seed,
        "keep": given.keep,
        "select": given.select,
        "overrides": given.overrides,
        "seeds": given.seeds,
        "prompts": given.prompts,
        "images_a_prompt": given.images,
        "rows": given.rows,
        "pairs": {arm: PairTable.open(data).num_rows for arm, data in sets.items()},
        "labels_that_agree_with_truth": {arm: truth(data) for arm, data in sets.items()},
        "minutes": {f"{arm}-{seed}": round(m, 2) for (arm, seed), m in minutes.items()},
        "comparisons": comparisons(given.arms, given.judges.split(","), base, found),
    }
    write_atomic(given.out, json.dumps(result, indent=1) + "\n")
    for title, judged in result["comparisons"].items():
        for judge in judged:
            low, high = judge["difference_interval"]
            print(f"{title}: {judge['judge']} {judge['difference']:+.4f} [{low:+.4f}, {high:+.4f}]")


if __name__ == "__main__":
    main()
