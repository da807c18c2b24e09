"""Does a policy go on getting better while its proxy says so? D3PO on several proxies, watched.

    python benchmarks/overoptimisation.py --rows 20000 --seeds 0 --out FILE
    python benchmarks/overoptimisation.py --draw FILE --png docs/overoptimisation.png

All proxies but `mini`, the shipped one, are fitted here, on one data set of the mini world:

    scalar    a Bradley-Terry head on the pairs
    leaky     named objectives with a gate; the ratings leak saturation, nothing is taken out
    debiased  the same ratings and pairs, nuisances taken out (rank correlation at most 0.03)

D3PO trains on each, and every few updates held-out prompts are painted and judged by the proxy and
by the truth, the utility that the mini world's people share: 3 share + [share = 1] + 1.5 neatness.
What is there already is not trained again.
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
from learning import ROOT
from objectives import rate

from d3po.recipe import load, train
from fifa.config import write_atomic
from fifa.miniworld.dataset import write_dataset
from fifa.proxies import FitConfig
from fifa.proxies.fit import fit

CONFIG = ROOT / "configs" / "mini_d3po_alignment.yaml"
TRUTH = "3*oracle+1*oracle_strict+1.5*neatness"
PROXIES = ("mini", "scalar", "leaky", "debiased")


def fitted(work: Path, rows: int) -> dict[str, str]:
    """The name of each proxy as a reward; what is not there yet is made."""
    pairs, ratings = work / "pairs", work / "ratings.parquet"
    write_dataset(pairs, rows=rows, seed=5)
    if not ratings.is_file():
        rate(pairs, ratings, 0)
    rated: dict[str, Any] = {"kind": "objectives", "ratings": ratings}
    kinds = {"scalar": {}, "leaky": {**rated, "rank_correlation": 1.0}, "debiased": rated}
    for name, given in kinds.items():
        if not (work / name).is_dir():
            fit(FitConfig(pairs=pairs, out=work / name, **given))
    return {"mini": "mini", **{name: f"fitted:{work / name}" for name in kinds}}


def watched(folder: Path) -> list[dict[str, float]]:
    """Of each evaluation of a run: its step, and what policy has more than the base."""
    rows = []
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["kind"] != "eval":
            continue
        gains = [judge["difference"] for judge in row["judges"].values()]
        tones = {name: row[name]["policy"] - row[name]["reference"] for name in ("saturation",)}
        named = dict(zip(("proxy", "truth", "oracle", "neatness"), gains, strict=True))
        rows.append({"step": row["step"], **named, **tones})
    return rows


def pushed(proxy: str, name: str, seed: int, given: argparse.Namespace) -> list[dict[str, float]]:
    """One run on a proxy and what was seen on the way."""
    folder = given.work / "runs" / f"{name}-{seed}"
    if not (folder / "weights").is_dir():
        own = [f"run.dir={folder}", f"run.seed={seed}", f"policy.seed={seed}"]
        own += [f"online.judges=['{proxy}']", f"eval.judges=['{proxy}','{TRUTH}',oracle,neatness]"]
        own += [f"eval.count={given.prompts}", "eval.images=2", f"eval.every={given.every}"]
        own += ["eval.grid_prompts=0", f"optim.max_steps={given.steps}", *given.overrides]
        with redirect_stdout(io.StringIO()):
            train(load(CONFIG, own))
    return watched(folder)


def turn(runs: list[list[dict[str, float]]]) -> dict[str, float]:
    """Where the mean truth was largest, and what was lost of it by the end."""
    steps = [row["step"] for row in runs[0]]
    truth = np.array([[row["truth"] for row in run] for run in runs]).mean(0)
    proxy = np.array([[row["proxy"] for row in run] for run in runs]).mean(0)
    best = int(truth.argmax())
    return {
        "best_step": steps[best],
        "truth_at_best": float(truth[best]),
        "truth_at_end": float(truth[-1]),
        "proxy_at_best": float(proxy[best]),
        "proxy_at_end": float(proxy[-1]),
    }


def draw(result: dict[str, Any], png: Path) -> None:
    """Above what each proxy saw, below the truth: mean and range over seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), layout="constrained")
    panels = {"proxy": "its own proxy, relative", "truth": "truth", "saturation": "saturation"}
    for place, (key, title) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(1, 3, place)
        for name, found in result["proxies"].items():
            values = np.array([[row[key] for row in run] for run in found["runs"]])
            steps = [row["step"] for row in found["runs"][0]]
            if key == "proxy":  # each has its own unit
                values = values / np.abs(values.mean(0)).max()
            (line,) = axes.plot(steps, values.mean(0), label=name)
            shade = {"color": line.get_color(), "alpha": 0.15, "linewidth": 0}
            axes.fill_between(steps, values.min(0), values.max(0), **shade)
        axes.axhline(0, color="0.8", linewidth=0.8, zorder=0)
        axes.set_title(f"{title}, policy less base", fontsize=10)
        axes.set_xlabel("updates")
        axes.legend(frameon=False, fontsize=8)
    png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png, dpi=110)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("overrides", nargs="*", help="key=value for train.py")
    parser.add_argument("--proxies", nargs="+", default=list(PROXIES), choices=PROXIES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--rows", type=int, default=20_000, help="pairs that proxies learn from")
    parser.add_argument("--steps", type=int, default=120, help="updates of a run")
    parser.add_argument("--every", type=int, default=20, help="updates between two looks")
    parser.add_argument("--prompts", type=int, default=48, help="held-out, two pictures each")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "overoptimisation")
    parser.add_argument("--out", type=Path, help="JSON file of all numbers")
    parser.add_argument("--draw", type=Path, help="a JSON file to draw; nothing is trained")
    parser.add_argument("--png", type=Path, help="picture of the curves")
    return parser.parse_args()


def main() -> None:
    """Fit, train, watch; or draw."""
    given = parsed()
    torch.set_num_threads(1)
    if given.draw:
        result = json.loads(given.draw.read_text(encoding="utf-8"))
    else:
        names = fitted(given.work, given.rows)
        result = {"rows": given.rows, "prompts": given.prompts, "overrides": given.overrides}
        result["proxies"] = {}
        for name in given.proxies:
            runs = [pushed(names[name], name, seed, given) for seed in given.seeds]
            result["proxies"][name] = {"runs": runs, **turn(runs)}
            told = {key: round(value, 3) for key, value in turn(runs).items()}
            print(f"{name}: {told}", flush=True)
    if given.out:
        write_atomic(given.out, json.dumps(result, indent=1) + "\n")
    if given.png:
        draw(result, given.png)


if __name__ == "__main__":
    main()
