"""Which method learns most? The same rollouts, or the same pairs, under every objective.

    python benchmarks/methods.py online configs/mini_d3po_compressibility.yaml --out FILE
    python benchmarks/methods.py stored --seeds 0 1 --betas 0.1 1 --out FILE
    python benchmarks/methods.py curves FILE FILE --png docs/methods.png

`online`: D3PO, DDPO, DPOK and reward-weighted regression at equal samples: the same number of
prompts, images, steps, updates and rounds; only the objective differs. Each has its learning rate
chosen from the same grid by one run on `--tune-seed`, which is not among the seeds compared, on
other held-out prompts; that is the fair part of tuning, all else is as the config has it.

`stored`: every objective that goes with stored pairs, on the same pairs (what FiFA keeps of a
mini-world data set, as in filters.py), the same steps and rate. Several `--betas`, factors of the
beta in STORED, are chosen from as the rates are.

Intervals resample runs and prompts (see learning.py). What is there already is not trained again.
"""

from __future__ import annotations

import argparse
import io
import json
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from learning import ROOT, held_out, interval, scores, summary

from d3po.recipe import load, load_run, train
from fifa.config import write_atomic

# clip: the published 1e-4 per element of 16,384 is 1.6 nats; over this model's 512 elements 3.2e-3.
ONLINE = {
    "d3po": [],  # as the config has it
    "ddpo": ["objective={name: ddpo, options: {clip: 3.2e-3}}"],
    "dpok": ["objective={name: dpok, beta: 0.01, options: {clip: 3.2e-3}}"],
    "reward_weighted": ["objective={name: reward_weighted, beta: 1.0}"],
}
# Betas: DPO's published one. For objectives that ask for a margin (ipo, hinge, sppo) such that the
# margin, in errors, is what 120 gentle steps can reach; without a reference as published.
STORED = {
    "dpo": ["objective={name: dpo, beta: 2000}"],
    "dpo, inverted": ["objective={name: dpo, beta: 2000}", "offline.path=inverted"],
    "d3po_clipped": ["objective={name: d3po_clipped, beta: 2000, options: {clip: 0.01}}"],
    "ipo": ["objective={name: ipo, beta: 50}"],
    "hinge": ["objective={name: hinge, beta: 2000}"],
    "robust": ["objective={name: robust, beta: 2000, options: {label_smoothing: 0.1}}"],
    "conservative": ["objective={name: conservative, beta: 2000, options: {label_smoothing: 0.1}}"],
    "sppo": ["objective={name: sppo, beta: 50}"],
    "dpo + sft": ["objective={name: dpo, beta: 2000, sft: 100}"],
    "kto": ["objective={name: kto, beta: 2000}"],
    "simpo": ["objective={name: simpo, beta: 2000}"],
    "orpo": ["objective={name: orpo, beta: 0.1}"],
    "mapo": ["objective={name: mapo, beta: 0.1}"],
}


def trained(config: Path, folder: Path, seed: int, overrides: list[str]) -> None:
    """One run, in this process; a finished one is only looked at, one of other settings refused."""
    own = [f"run.dir={folder}", f"run.seed={seed}", f"policy.seed={seed}", "eval.prompts=null"]
    with redirect_stdout(io.StringIO()):
        train(load(config, [*own, *overrides]))


def mean_score(folder: Path, prompts: int, images: int, seed: int) -> float:
    """Mean score by the config's first judge, over held-out prompts drawn with `seed`."""
    config, policy = load_run(folder)
    texts = held_out(config, prompts, seed)
    found, _ = scores(policy, config, [config.eval.judges[0]], texts, images)
    return float(found.mean())


def curve(folder: Path) -> list[list[float]]:
    """[images drawn so far, mean reward of the rollout just drawn], round by round."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rounds = [row for row in rows if row["kind"] == "round"]
    drawn = np.cumsum([row["images"] for row in rounds])
    return [[int(n), next(iter(r["reward"].values()))] for n, r in zip(drawn, rounds, strict=True)]


def tuned(
    arms: dict[str, list[str]], grid: dict[str, list[str]], config: Path, given: argparse.Namespace
) -> tuple[dict[str, dict[str, float]], dict[str, list[str]]]:
    """Mean score of each arm at each point of its grid, by the tuning seed; the arms at their best.

    grid: of each arm the overrides to choose from.
    """
    found: dict[str, dict[str, float]] = {}
    for arm, own in arms.items():
        found[arm] = {}
        for choice in grid[arm]:
            folder = given.runs / f"{config.stem}-{arm.replace(' ', '')}-tune-{choice}"
            trained(config, folder, given.tune_seed, [*own, choice, *given.overrides])
            found[arm][choice] = mean_score(folder, given.prompts, given.images, seed=98)
            print(f"{arm}, {choice}: {found[arm][choice]:.4f}", flush=True)
    best = {arm: max(scored, key=scored.__getitem__) for arm, scored in found.items()}
    return found, {arm: [*own, best[arm]] for arm, own in arms.items()}


def compared(
    arms: dict[str, list[str]], config_path: Path, given: argparse.Namespace
) -> dict[str, Any]:
    """Train every arm with every seed, and measure all on the same prompts and noise."""
    found: dict[str, list[Any]] = {arm: [] for arm in arms}
    curves: dict[str, list[Any]] = {arm: [] for arm in arms}
    base, judges = None, []
    for seed in given.seeds:
        for arm, overrides in arms.items():
            folder = given.runs / f"{config_path.stem}-{arm.replace(' ', '')}-{seed}"
            trained(config_path, folder, seed, [*overrides, *given.overrides])
            config, policy = load_run(folder)
            judges = given.judges.split(",") if given.judges else list(config.eval.judges)
            texts = held_out(config, given.prompts)
            if base is None:
                with policy.reference():
                    base, _ = scores(policy, config, judges, texts, given.images)
            with policy.averaged():
                found[arm].append(scores(policy, config, judges, texts, given.images)[0])
            curves[arm].append(curve(folder))
            print(f"{arm}, seed {seed}: {found[arm][-1].mean((0, 1)).round(4)}", flush=True)
    stacked = {arm: np.stack(rows) for arm, rows in found.items()}  # (runs, P, K, R)
    return {
        "config": str(config_path),
        "overrides": given.overrides,
        "seeds": given.seeds,
        "prompts": given.prompts,
        "images_a_prompt": given.images,
        "arms": {
            arm: {
                "settings": arms[arm],
                "judges": [summary(j, ours[..., r], base[..., r]) for r, j in enumerate(judges)],
                "curves": curves[arm],
            }
            for arm, ours in stacked.items()
        },
        "first_against": {
            arm: versus(stacked[next(iter(arms))][..., 0], ours[..., 0])
            for arm, ours in list(stacked.items())[1:]
        },
    }


def versus(first: np.ndarray, other: np.ndarray) -> dict[str, Any]:
    """The first arm against another by the first judge; scores (runs, P, K) of each."""
    difference = first - other
    low, high = interval(difference.mean(2))
    return {"difference": float(difference.mean()), "difference_interval": [low, high]}


def chosen(
    arms: dict[str, list[str]], grid: dict[str, list[str]], config: Path, given: argparse.Namespace
) -> dict[str, Any]:
    """Tune what there is a choice of, then compare all arms."""
    if all(len(choices) == 1 for choices in grid.values()):
        only = {arm: [*own, *grid[arm]] for arm, own in arms.items()}
        return {"tuning": {}, **compared(only, config, given)}
    tuning, best = tuned(arms, grid, config, given)
    return {"tuning": tuning, **compared(best, config, given)}


def online(given: argparse.Namespace) -> dict[str, Any]:
    """Tune each method's rate, then compare all at equal samples."""
    arms = {method: ONLINE[method] for method in given.methods}
    rates = [f"optim.learning_rate={rate:g}" for rate in given.rates]
    return chosen(arms, dict.fromkeys(arms, rates), given.config, given)


def stored(given: argparse.Namespace) -> dict[str, Any]:
    """Make the pairs as filters.py does, then compare all objectives on them."""
    from filters import CONFIG, KEPT, kept, write_dataset

    from fifa.scoring import ScoreConfig, score

    work = given.runs / "data"
    if not (work / "kept" / f"importance-{given.keep}-any" / KEPT).is_file():
        write_dataset(work / "pairs", given.rows, 0)
        score(ScoreConfig(data=work / "pairs", out=work / "scores"))
    data = kept("importance", work, given.keep, 0, [])
    own = [f"offline.data={data}", f"offline.cache={work / 'cache'}"]
    arms = {name: [*STORED[name], *own] for name in given.methods}
    grid = {arm: betas(CONFIG, STORED[arm], given.betas) for arm in arms}
    return {"rows": given.rows, "keep": given.keep, **chosen(arms, grid, CONFIG, given)}


def betas(config: Path, own: list[str], factors: list[float]) -> list[str]:
    """Overrides that multiply the beta of an arm."""
    beta = load(config, own).objective.beta
    return [f"objective.beta={beta * factor:g}" for factor in factors]


def draw(files: list[Path], png: Path) -> None:
    """The rollouts' reward against samples, a panel a task: mean and range over seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(files), 3.4), layout="constrained")
    for place, file in enumerate(files, 1):
        result = json.loads(file.read_text(encoding="utf-8"))
        axes = figure.add_subplot(1, len(files), place)
        for arm, found in result["arms"].items():
            runs = np.array([[value for _, value in run] for run in found["curves"]])
            drawn = np.array([count for count, _ in found["curves"][0]])
            width = max(1, runs.shape[1] // 8)  # rounds that a point averages over
            kernel = np.ones(width) / width
            smooth = np.stack([np.convolve(run, kernel, "valid") for run in runs])
            (line,) = axes.plot(drawn[width - 1 :], smooth.mean(0), label=arm)
            shade = {"color": line.get_color(), "alpha": 0.15, "linewidth": 0}
            axes.fill_between(drawn[width - 1 :], smooth.min(0), smooth.max(0), **shade)
        axes.set_title(Path(result["config"]).stem.removeprefix("mini_d3po_"))
        axes.set_xlabel("images drawn")
        axes.set_ylabel(f"{next(iter(result['arms'].values()))['judges'][0]['judge']}")
        axes.legend(frameon=False, fontsize=8)
    png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png, dpi=110)


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    kinds = parser.add_subparsers(dest="kind", required=True)
    for kind, table in (("online", ONLINE), ("stored", STORED)):
        one = kinds.add_parser(kind)
        if kind == "online":
            one.add_argument("config", type=Path)
            one.add_argument("--rates", type=float, nargs="+", default=[1e-3, 2e-3])
        else:
            one.add_argument("--rows", type=int, default=20_000)
            one.add_argument("--keep", default="5%")
            one.add_argument("--betas", type=float, nargs="+", default=[1.0], help="factors")
        one.add_argument("overrides", nargs="*", help="key=value for train.py")
        one.add_argument("--methods", nargs="+", default=list(table), choices=list(table))
        one.add_argument("--tune-seed", type=int, default=100)
        one.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
        one.add_argument("--prompts", type=int, default=64)
        one.add_argument("--images", type=int, default=4)
        one.add_argument("--judges", default=None, help="comma-separated; default: the config's")
        one.add_argument("--runs", type=Path, default=ROOT / "runs" / "methods")
        one.add_argument("--out", type=Path, required=True)
    curves = kinds.add_parser("curves")
    curves.add_argument("files", type=Path, nargs="+")
    curves.add_argument("--png", type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    """Do one of the three."""
    given = parsed()
    torch.set_num_threads(1)
    if given.kind == "curves":
        draw(given.files, given.png)
        return
    result = online(given) if given.kind == "online" else stored(given)
    text = json.dumps(result, indent=1).replace(f"{ROOT}/", "")  # others have it elsewhere
    write_atomic(given.out, text + "\n")
    for arm, found in result["arms"].items():
        for judge in found["judges"]:
            low, high = judge["difference_interval"]
            change = f"{judge['difference']:+.4f} [{low:+.4f}, {high:+.4f}]"
            print(f"{arm}: {judge['judge']} {judge['base']:.4f} {change} won {judge['win_rate']}")


if __name__ == "__main__":
    main()
