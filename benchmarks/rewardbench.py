"""Is a place on the reward bench worth anything? Bench accuracy against what best-of-n brings.

    python benchmarks/rewardbench.py synthetic --seeds 0 1 2 --out FILE
    python benchmarks/rewardbench.py pixels --seeds 0 1 2 --out FILE

synthetic: 16 rewards that are the truth plus a corruption of their own in each of four scenarios,
300 pairs a scenario, four noisy judges who must all agree, a weak panel that drops the obvious and
the hopeless. Each reward then picks the best of 16 candidates of 300 prompts a scenario; their true
quality is what it brings. Labels, difficulty, accuracy and macro mean are the functions of
`fifa.rewardbench`.

pixels: real rewards on a bench of the mini world, and on 16 candidates of each of 120 prompts by
painters of different skill, of which each picks one.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

from fifa.config import write_atomic
from fifa.images import to_batch, to_uint8
from fifa.miniworld.annotators import mean_utility
from fifa.miniworld.captions import parse, phrase, sample_request
from fifa.miniworld.oracle import View, judge, look
from fifa.miniworld.painters import PAINTER_SHARES, paint
from fifa.miniworld.scenes import SIZE
from fifa.rewardbench import BuildConfig
from fifa.rewardbench.build import build
from fifa.rewardbench.judges import agreed, majority
from fifa.rewardbench.measures import accuracy, by_group, difficulty, macro_mean, within
from fifa.rewardbench.pairwise import margins_of, pictures_of
from fifa.rewardbench.standing import standing
from fifa.rewardbench.table import load_bench
from fifa.rewards import Reward, load_reward, score_images

Array = np.ndarray[Any, np.dtype[np.float64]]

SCENARIOS, PAIRS, REWARDS, JUDGES, PANEL, BEST_OF, PROMPTS = 4, 300, 16, 4, 5, 16, 300
KEEP = (0.2, 0.8)


# ---- a world of numbers --------------------------------------------------------------------------


def corrupted(quality: Array, nuisance: Array, noise: float, lean: float, rng: Any) -> Array:
    """A score: the truth, and noise of which the share `lean` (of the variance) is the nuisance."""
    own = rng.normal(size=quality.shape)
    return quality + noise * (np.sqrt(lean) * nuisance + np.sqrt(1 - lean) * own)


def synthetic(seed: int) -> dict[str, Any]:
    """One synthetic world."""
    rng = np.random.default_rng([seed, 0x72625])
    level = np.exp(rng.uniform(np.log(0.8), np.log(3), REWARDS))  # how corrupt a reward is
    noise = level[:, None] * np.exp(rng.normal(0, 0.4, (REWARDS, SCENARIOS)))  # and where
    lean = rng.uniform(0, 1, (REWARDS, SCENARIOS))
    margins = np.empty((REWARDS, SCENARIOS * PAIRS))
    panel = np.empty((PANEL, SCENARIOS * PAIRS))
    verdicts = np.empty((JUDGES, SCENARIOS * PAIRS), np.int8)
    gold = np.empty(SCENARIOS * PAIRS)
    brought = np.empty((REWARDS, SCENARIOS))
    for s in range(SCENARIOS):
        here = slice(s * PAIRS, (s + 1) * PAIRS)
        q, z = rng.normal(size=(2, PAIRS, 2))
        gold[here] = q[:, 0] - q[:, 1]
        for j in range(JUDGES):
            seen = corrupted(q, z, 0.5, 0.2, rng)
            verdicts[j, here] = seen[:, 1] > seen[:, 0]
        for p in range(PANEL):
            panel[p, here] = -np.diff(corrupted(q, z, 2.0, 0.3, rng), axis=1)[:, 0]
        candidates, gloss = rng.normal(size=(2, PROMPTS, BEST_OF))
        for r in range(REWARDS):
            score = corrupted(q, z, noise[r, s], lean[r, s], rng)
            margins[r, here] = score[:, 0] - score[:, 1]
            scores = corrupted(candidates, gloss, noise[r, s], lean[r, s], rng)
            brought[r, s] = candidates[np.arange(PROMPTS), scores.argmax(1)].mean()
    return benched(margins, panel, verdicts, gold, brought, rng)


def benched(
    margins: Array, panel: Array, verdicts: Any, gold: Array, brought: Array, rng: Any
) -> dict[str, Any]:
    """What the functions of the bench make of a synthetic world."""
    scenario = [str(s) for s in range(SCENARIOS) for _ in range(PAIRS)]
    label, kept = majority(verdicts), agreed(verdicts, JUDGES)
    truth = (gold < 0).astype(np.int8)
    main = kept & within(difficulty(panel, label), KEEP)
    names = [name for name, counts in zip(scenario, main, strict=True) if counts]

    def macro(margin: Array) -> float:
        return macro_mean(by_group(margin[main], label[main], names))

    groups = [by_group(m[main], label[main], names) for m in margins]
    accuracies = np.array([[group[str(s)].value for s in range(SCENARIOS)] for group in groups])
    overall = np.array([macro_mean(group) for group in groups])
    by_scenario = [spearmanr(accuracies[:, s], brought[:, s]).statistic for s in range(SCENARIOS)]
    negated = max(abs(macro(-m) - (1 - macro(m))) for m in margins)
    return {
        "spearman": float(spearmanr(overall, brought.mean(1)).statistic),
        "spearman_by_scenario": [float(value) for value in by_scenario],
        "pairs": int(main.sum()),
        "agreed": int(kept.sum()),
        "kept_labels_true": float((label == truth)[kept].mean()),
        "main_labels_true": float((label == truth)[main].mean()),
        "majority_labels_true": float((label == truth)[label >= 0].mean()),
        "one_judge_true": float((verdicts == truth).mean()),
        "gold": macro(gold),
        "gold_on_all_agreed": accuracy(gold[kept], label[kept]).value,
        "constant": macro(np.zeros_like(gold)),
        "random": macro(rng.normal(size=len(gold))),
        "negated_gap": float(negated),
        "accuracy": {"mean": float(overall.mean()), "best": float(overall.max())},
    }


# ---- a world of pixels ---------------------------------------------------------------------------


class Flawed:
    """The oracle's share of conditions, blind to some kinds of them, with noise of its own.

    The noise of a picture depends on its pixels, the prompt and the reward's name alone.
    """

    differentiable = False

    def __init__(self, name: str, blind: Sequence[str] = (), noise: float = 0.0) -> None:
        self.name, self.blind, self.noise = name, set(blind), noise

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        pixels = to_uint8(images)
        scores = [self._score(p, prompt) for p, prompt in zip(pixels, prompts, strict=True)]
        return torch.tensor(scores, dtype=torch.float32)

    def _score(self, pixels: Any, prompt: str) -> float:
        conditions = judge(_view(pixels.tobytes()), parse(prompt)).conditions
        seen = [c.holds for c in conditions if c.kind not in self.blind]
        key = blake2b(pixels.tobytes() + f"{prompt}{self.name}".encode(), digest_size=8).digest()
        own = np.random.default_rng(int.from_bytes(key, "big")).normal()
        return float(np.mean(seen or [1.0])) + self.noise * float(own)


@lru_cache(maxsize=20_000)
def _view(pixels: bytes) -> View:
    """What the oracle sees in a picture, once for all flawed rewards."""
    return look(np.frombuffer(pixels, np.uint8).reshape(SIZE, SIZE, 3))


FLAWS: dict[str, dict[str, Any]] = {
    "noise 0.1": {"noise": 0.1},
    "noise 0.3": {"noise": 0.3},
    "noise 1": {"noise": 1.0},
    "blind to relations": {"blind": ("relation",)},
    "blind to counts": {"blind": ("count",)},
    "blind to colours": {"blind": ("colour", "count")},
    "objects alone": {"blind": ("colour", "size", "count", "relation", "background", "without")},
}


def flawed(path: str) -> Flawed:
    """The oracle with a flaw of FLAWS, by its name: the reward `rewardbench:flawed:NAME`."""
    return Flawed(path, **FLAWS[path])


def contestants() -> list[Reward]:
    """Real rewards of the table, mixtures of them, and oracles with a flaw each."""
    named = (
        "mini",
        "neatness",
        "jpeg_compressibility",
        "jpeg_incompressibility",
        "saturation",
        "contrast",
        "edges",
        "oracle",
        "oracle_strict",
        "0.7*oracle+0.3*neatness",
        "0.1*mini+1*oracle",
        "0.2*mini+1*neatness",
        "0.1*mini+10*saturation",
    )
    return [*map(load_reward, named), *map(flawed, FLAWS)]


def candidates(prompts: int, seed: int) -> tuple[list[str], Any]:
    """Prompts and BEST_OF pictures of each, uint8 (prompts, BEST_OF, 32, 32, 3)."""
    rng = np.random.default_rng([seed, 0x626F6E])
    texts, made = [], []
    for _ in range(prompts):
        request = sample_request(rng, "heldout")
        texts.append(phrase(request, rng))
        painters = rng.choice(list(PAINTER_SHARES), BEST_OF, p=list(PAINTER_SHARES.values()))
        made.append([paint(str(painter), request, rng).pixels for painter in painters])
    return texts, np.array(made)


def picked(reward: Reward, texts: Sequence[str], pictures: Any) -> Any:
    """Which of its candidates a reward prefers for each prompt, (prompts,), the first of equals."""
    found = [
        int(score_images(reward, to_batch(list(group)), [text] * len(group)).argmax())
        for text, group in zip(texts, pictures, strict=True)
    ]
    return np.array(found)


def pixels(seed: int, pairs: int, prompts: int) -> dict[str, Any]:
    """One bench and one set of candidates of the mini world."""
    with tempfile.TemporaryDirectory() as folder:
        facts = build(BuildConfig(out=Path(folder) / "bench", pairs=pairs, seed=seed))
        items = load_bench(Path(folder) / "bench").counted()
    shown, _ = pictures_of(items)
    texts, pictures = candidates(prompts, seed)
    flat = [p for group in pictures for p in group]
    repeated = [text for text in texts for _ in range(BEST_OF)]
    true = score_images(load_reward("oracle"), to_batch(flat), repeated).numpy()
    true = true.reshape(prompts, BEST_OF)
    crowd = mean_utility(flat, repeated).reshape(prompts, BEST_OF)
    rows, found = np.arange(prompts), {}
    for reward in contestants():
        stands = standing(reward.name, items, margins_of(reward, shown, 256).margin)
        pick = picked(reward, texts, pictures)
        found[reward.name] = {
            "macro": stands.macro,
            "without_harmless": macro_mean(
                {name: part for name, part in stands.scenarios.items() if name != "harmless"}
            ),
            "scenarios": {name: part.value for name, part in stands.scenarios.items()},
            "bands": {name: part.value for name, part in stands.bands.items()},
            "oracle_of_pick": float(true[rows, pick].mean()),
            "crowd_of_pick": float(crowd[rows, pick].mean()),
        }
    return {
        "agreed": facts["agreed"],
        "label_truth": facts["label_truth"],
        "any_picture": {"oracle": float(true.mean()), "crowd": float(crowd.mean())},
        "rewards": found,
        "spearman": correlations(found),
    }


def correlations(found: dict[str, Any]) -> dict[str, float]:
    """Rank correlation over the rewards of bench accuracy with what their picks are worth."""
    values = list(found.values())
    worth = {name: [v[f"{name}_of_pick"] for v in values] for name in ("oracle", "crowd")}
    result = {}
    for name, picks in worth.items():
        for column in ("macro", "without_harmless"):
            bench = [v[column] for v in values]
            result[f"{column} and {name}"] = float(spearmanr(bench, picks).statistic)
    for scenario in values[0]["scenarios"]:
        bench = [v["scenarios"][scenario] for v in values]
        result[f"{scenario} and crowd"] = float(spearmanr(bench, worth["crowd"]).statistic)
    return result


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("world", choices=("synthetic", "pixels"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--pairs", type=int, default=60, help="a scenario, pixels only")
    parser.add_argument("--prompts", type=int, default=120, help="pixels only")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    runs: list[dict[str, Any]] = []
    for seed in given.seeds:
        if given.world == "synthetic":
            runs.append(synthetic(seed))
        else:
            runs.append(pixels(seed, given.pairs, given.prompts))
        print(f"seed {seed}: {json.dumps(runs[-1]['spearman'])}", flush=True)
        result = {"world": given.world, "seeds": given.seeds[: len(runs)], "runs": runs}
        write_atomic(given.out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
