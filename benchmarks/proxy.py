"""Does a proxy fitted in a minute on frozen features know people better than the mini reward?

    python benchmarks/proxy.py --rows 20000 --others 3000 --seeds 0 1 2 --out runs/proxy.json

Fits linear, MLP and pairwise heads to one data set of the mini world, tunes the last blocks of the
encoder on it, and counts on another how often each orders two pictures as their hidden utility
does, and as the person's label does. The mini reward is the cosine of the very features that the
heads read. Differences are of the same pairs, mean over the seeds, with a 95% bootstrap interval
over prompts.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from fifa.bench import share
from fifa.config import write_atomic
from fifa.features import CACHE, PairFeatures, pair_features
from fifa.miniworld.dataset import write_dataset
from fifa.proxies import FitConfig
from fifa.proxies.card import margins_of
from fifa.proxies.fit import fit_heads
from fifa.proxies.lora import tune
from fifa.proxies.splits import split_pairs
from fifa.rewards.encoders import load_encoder

Floats = NDArray[np.float64]

ARMS: dict[str, dict[str, Any]] = {
    "mlp": {"members": 3},
    "linear": {"hidden": 0, "members": 1},
    "pairwise": {"kind": "pairwise", "members": 1},
}
LORA = "lora"


def right(margin: Floats, truth: Floats) -> Floats:
    """1 where two margins order a pair alike, 0 where not, one half where one of them is 0."""
    agrees = np.sign(margin) == np.sign(truth)
    return np.where((margin == 0) | (truth == 0), 0.5, agrees).astype(float)


def cosine_margin(pairs: PairFeatures) -> Floats:
    """What the mini reward says, up to its scale."""
    text = pairs.texts[pairs.prompt]
    first, second = pairs.pictures[pairs.first], pairs.pictures[pairs.second]
    return ((first - second) * text).sum(1).astype(float)


def interval(difference: Floats, prompt: NDArray[np.int64], draws: int = 2000) -> list[float]:
    """95% bootstrap interval of the mean, whole prompts drawn."""
    rng = np.random.default_rng(0)
    count = int(prompt.max()) + 1
    total, rows = np.bincount(prompt, difference, count), np.bincount(prompt, minlength=count)
    drawn = rng.integers(count, size=(draws, count))
    means = total[drawn].sum(1) / rows[drawn].sum(1)
    return [float(x) for x in np.quantile(means, [0.025, 0.975])]


def hidden_margin(folder: Path, pairs: PairFeatures) -> Floats:
    """Difference of the hidden utility, of the usable rows."""
    names = ["truth_utility_0", "truth_utility_1"]
    files = sorted(folder.glob("*.parquet"))
    first, second = (
        np.concatenate([pq.read_table(file, columns=[name])[name].to_numpy() for file in files])
        for name in names
    )
    return (first - second)[pairs.row]


def told(agreement: Floats) -> dict[str, float]:
    found = share(float(agreement.sum()), len(agreement))
    return {"value": found.value, "low": found.low, "high": found.high, "pairs": found.pairs}


def compare(
    rewards: Sequence[Floats], mini: Floats, truth: Floats, prompt: NDArray[np.int64]
) -> dict[str, Any]:
    """Agreement of each seed's margins with `truth`, and how much more than the mini reward's."""
    agreements = [right(margin, truth) for margin in rewards]
    difference = np.mean(agreements, axis=0) - right(mini, truth)
    return {
        "seeds": [told(agreement) for agreement in agreements],
        "more_than_mini": float(difference.mean()),
        "interval": interval(difference, prompt),
    }


def arm(
    given: dict[str, Any], train: PairFeatures, other: PairFeatures, seeds: Sequence[int]
) -> tuple[list[Floats], list[float]]:
    """Margins on the other data of one proxy a seed, and the CPU seconds each fit took."""
    margins, seconds = [], []
    for seed in seeds:
        config = FitConfig(pairs=Path("-"), out=Path("-"), seed=seed, **given)
        start = time.process_time()
        split = split_pairs(train, config.held_out, seed, drop_ties=False)
        proxy = fit_heads(config, train, split)
        seconds.append(round(time.process_time() - start, 1))
        margins.append(margins_of(proxy, other, np.arange(len(other))).mean(0))
    return margins, seconds


def tuned(
    work: Path, train: PairFeatures, seeds: Sequence[int]
) -> tuple[list[Floats], list[float]]:
    """The same of the encoder's cosine after tuning its last blocks."""
    margins, seconds = [], []
    for seed in seeds:
        config = FitConfig(pairs=work / "train", out=Path("-"), kind="lora", seed=seed)
        start = time.process_time()
        split = split_pairs(train, config.held_out, seed, drop_ties=False)
        with tempfile.TemporaryDirectory() as folder:
            encoder = tune(config, load_encoder(), train, split, Path(folder), lambda *told: None)
        seconds.append(round(time.process_time() - start, 1))
        margins.append(cosine_margin(pair_features(work / "other", encoder)))
    return margins, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=20_000, help="pairs to learn from")
    parser.add_argument("--others", type=int, default=3000, help="pairs to be measured on")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=[*ARMS, LORA], default=[*ARMS, LORA])
    parser.add_argument("--work", type=Path, default=Path("runs/proxy"), help="data and features")
    parser.add_argument("--out", type=Path, help="JSON file of all numbers")
    args = parser.parse_args()

    encoder = load_encoder("mini")
    found = []
    for name, rows, seed in (("train", args.rows, 5), ("other", args.others, 77)):
        write_dataset(args.work / name, rows=rows, seed=seed)
        found.append(pair_features(args.work / name, encoder, args.work / CACHE))
    train, other = found
    truth, mini = hidden_margin(args.work / "other", other), cosine_margin(other)
    strict = other.label != 0.5
    label = other.label.astype(float) - 0.5
    result: dict[str, Any] = {
        "rows": len(train),
        "others": len(other),
        "mini": {
            "truth": told(right(mini, truth)),
            "label": told(right(mini, label)[strict]),
        },
        "truth_and_label": told(right(truth, label)[strict]),
    }
    print(f"mini      truth {result['mini']['truth']['value']:.4f}", flush=True)
    for name in args.arms:
        if name == LORA:
            margins, seconds = tuned(args.work, train, args.seeds)
        else:
            margins, seconds = arm(ARMS[name], train, other, args.seeds)
        by = {
            "truth": compare(margins, mini, truth, other.prompt),
            "label": compare(
                [m[strict] for m in margins], mini[strict], label[strict], other.prompt[strict]
            ),
        }
        result[name] = {**by, "cpu_seconds": seconds}
        low, high = by["truth"]["interval"]
        shares = ", ".join(f"{s['value']:.4f}" for s in by["truth"]["seeds"])
        print(
            f"{name:9} truth {shares}; {by['truth']['more_than_mini']:+.4f} "
            f"[{low:+.4f}, {high:+.4f}] more than mini; {seconds} CPU s",
            flush=True,
        )
    if args.out is not None:
        write_atomic(args.out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
