"""ArmoRM's counterpart on a world whose answer is known, and ratings of the mini world.

    python benchmarks/objectives.py world --seeds 0 1 2 3 --out runs/objectives.json
    python benchmarks/objectives.py rate runs/pairs --out runs/ratings.parquet
    python benchmarks/objectives.py agiqa AGIQA-3K/data.csv --out runs/agiqa.json

`world`: five objectives; a nuisance leaks 0.7 into every rating, half of the ratings are missing;
prompts of four kinds care about two objectives each; people choose by Bradley-Terry. Compared are
the gate on debiased rewards, the gate without debiasing, fixed weights, a plain linear head and an
MLP on the same features, and the best that anyone could do.

`rate`: a rating table of a data set of the mini world: how much of the prompt holds, how neat the
picture is, how much is going on in it, by the oracle, with noise and with half a standard deviation
of saturation leaking into each.

`agiqa`: two heads, opinion of quality and of alignment (AGIQA-3K, arXiv 2306.04717), on what is
known of its pictures without the pictures: which model painted it, and the prompt. Counts how often
each head orders two pictures of a held-out prompt as either opinion does.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from fifa.bench import share
from fifa.config import atomic_path, write_atomic
from fifa.features import PairFeatures
from fifa.images import decode, to_batch
from fifa.miniworld.annotators import meaning
from fifa.miniworld.oracle import judge, look, neatness
from fifa.pairs import PairTable, held_out
from fifa.proxies import FitConfig
from fifa.proxies.card import margins_of, rank_correlation
from fifa.proxies.fit import fit_heads
from fifa.proxies.objectives import assemble, fit_ridge, objective_rewards
from fifa.proxies.ratings import Ratings
from fifa.proxies.splits import Split, split_pairs
from fifa.rewards.nuisance import NUISANCES, measure

Floats = NDArray[np.float64]

OBJECTIVES = ("alignment", "fidelity", "aesthetics", "detail", "safety")
CARES = np.array(  # of each kind of prompt for each objective, logits a standard deviation
    [[2.5, 2.0, 0, 0, 0], [0, 2.5, 2.0, 0, 0], [0, 0, 2.5, 2.0, 0], [0, 0, 0, 2.5, 2.0]]
)
LEAK = 0.7
NOISE = 0.1  # of a rating, in standard deviations of an objective
MISSING = 0.5
WIDTH = 64


# ---- the world -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """How features show what is in a picture and what a prompt wants."""

    pictures: Floats  # (6, WIDTH) five objectives and the nuisance
    texts: Floats  # (4, WIDTH) kinds of prompts

    @classmethod
    def drawn(cls, seed: int) -> World:
        rng = np.random.default_rng([seed, 0])
        basis, _ = np.linalg.qr(rng.normal(size=(WIDTH, 10)))
        return cls(basis.T[:6], 4 * basis.T[6:])

    def picture_rows(self, seen: Floats, rng: np.random.Generator) -> NDArray[np.float32]:
        """Features (M, WIDTH) of what is in the pictures (M, 6)."""
        noise = 0.05 * rng.normal(size=(len(seen), WIDTH))
        return (seen @ self.pictures + noise).astype(np.float32)

    def text_rows(self, kind: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.float32]:
        """Features (P, WIDTH) of prompts of these kinds."""
        noise = 0.2 * rng.normal(size=(len(kind), WIDTH))
        return (self.texts[kind] + noise).astype(np.float32)


@dataclass(frozen=True)
class Draw:
    """Pairs of the world, and what is true of them."""

    pairs: PairFeatures
    seen: Floats  # (2 N, 6)
    kind: NDArray[np.int64]  # (P,)

    @property
    def chance(self) -> Floats:
        """Probability that the first picture wins, (N,)."""
        cares = CARES[self.kind[self.pairs.prompt]]
        utility = self.seen[:, :5]
        delta = (cares * (utility[self.pairs.first] - utility[self.pairs.second])).sum(1)
        return 1 / (1 + np.exp(-delta))


def draw_pairs(world: World, rows: int, prompts: int, seed: int, part: str) -> Draw:
    """`rows` pairs under `prompts` prompts; another `part` has other prompts and pictures."""
    rng = np.random.default_rng([seed, 1, *part.encode()])
    kind = rng.integers(4, size=prompts)
    seen = rng.normal(size=(2 * rows, 6))
    nuisances = np.zeros((2 * rows, len(NUISANCES)), np.float32)
    nuisances[:, 0] = seen[:, 5]
    pairs = PairFeatures(
        pictures=world.picture_rows(seen, rng),
        nuisances=nuisances,
        texts=world.text_rows(kind, rng),
        prompts=tuple(f"{part} {i}" for i in range(prompts)),
        first=np.arange(rows),
        second=np.arange(rows) + rows,
        prompt=rng.integers(prompts, size=rows),
        label=np.zeros(rows, np.float32),
        users=("",) * rows,
        row=np.arange(rows),
        rejected=(),
        data=part,
        encoder="world",
    )
    draw = Draw(pairs, seen, kind)
    pairs.label[:] = rng.random(rows) < draw.chance
    return draw


def draw_ratings(world: World, rows: int, prompts: int, seed: int) -> Ratings:
    """`rows` rated pictures: the objectives, the leak, noise, half of it missing."""
    rng = np.random.default_rng([seed, 2])
    seen = rng.normal(size=(rows, 6))
    values = seen[:, :5] + LEAK * seen[:, 5:] + NOISE * rng.normal(size=(rows, 5))
    values[rng.random(values.shape) < MISSING] = np.nan
    kind = rng.integers(4, size=prompts)
    prompt = rng.integers(prompts, size=rows)
    return Ratings(
        OBJECTIVES,
        values,
        tuple(f"rated {i}" for i in prompt),
        world.picture_rows(seen, rng),
        world.text_rows(kind, rng)[prompt],
        (),
    )


# ---- the comparison ------------------------------------------------------------------------------


def settings(seed: int, **given: Any) -> FitConfig:
    return FitConfig(pairs=Path("-"), out=Path("-"), seed=seed, ties="half", members=1, **given)


def accuracy(margin: Floats, label: NDArray[np.float32]) -> float:
    return float(((margin > 0) == (label > 0.5)).mean())


def fixed_weights(proxy: Any, train: PairFeatures, split: Split, test: PairFeatures) -> Floats:
    """Margins on `test` of the debiased rewards at the weights that fit all training pairs best."""
    from sklearn.linear_model import LogisticRegression

    def difference(pairs: PairFeatures, rows: NDArray[np.int64]) -> Floats:
        first, second = (
            objective_rewards(proxy, pairs, side, rows) for side in (pairs.first, pairs.second)
        )
        return first - second

    model = LogisticRegression(fit_intercept=False)
    model.fit(difference(train, split.train), train.label[split.train])
    return difference(test, np.arange(len(test))) @ model.coef_[0]


def one_seed(seed: int, rows: int) -> dict[str, float]:
    """Every arm on one draw of the world."""
    world = World.drawn(seed)
    train = draw_pairs(world, rows, rows // 4, seed, "train").pairs
    drawn = draw_pairs(world, rows, rows // 4, seed, "other")
    test, everything = drawn.pairs, np.arange(rows)
    ratings = draw_ratings(world, rows, rows // 4, seed)
    split = split_pairs(train, 0.1, seed, drop_ties=False)
    gated, facts = assemble(settings(seed), train, split, ratings)
    raw, _ = assemble(settings(seed, rank_correlation=1.0), train, split, ratings)
    found = {
        "bayes": float(np.where(test.label > 0.5, drawn.chance > 0.5, drawn.chance < 0.5).mean())
    }
    margins = {
        "gated_debiased": margins_of(gated, test, everything)[0],
        "gated_raw": margins_of(raw, test, everything)[0],
        "fixed_weights": fixed_weights(gated, train, split, test),
    }
    for name, hidden in (("linear", 0), ("mlp", 64)):
        head = fit_heads(settings(seed, hidden=hidden), train, split)
        margins[name] = margins_of(head, test, everything)[0]
    found |= {name: accuracy(margin, test.label) for name, margin in margins.items()}
    nuisance = drawn.seen[: len(test), 5]
    for name, proxy in (("debiased", gated), ("raw", raw)):
        with torch.no_grad():
            score = proxy.scores(
                torch.tensor(test.pictures[test.first]),
                torch.tensor(test.nuisances[test.first]),
                torch.tensor(test.texts[test.prompt]),
            )[0]
        found[f"nuisance_{name}"] = rank_correlation(score.numpy(), nuisance)
    with torch.no_grad():
        top = gated.gate(torch.tensor(test.texts)).argmax(1).numpy()
    found["top_gate"] = float((CARES[drawn.kind, top] > 0).mean())
    found["least_r2"] = min(fact["r2"] for fact in facts.values())
    found["additivity_error"] = additivity_error(gated, test)
    return found


def additivity_error(proxy: Any, pairs: PairFeatures) -> float:
    """Largest |total - sum of the products in float64|."""
    pictures, nuisances, texts = (
        torch.tensor(pairs.pictures[pairs.first]),
        torch.tensor(pairs.nuisances[pairs.first]),
        torch.tensor(pairs.texts[pairs.prompt]),
    )
    with torch.no_grad():
        rewards = proxy.rewards(pictures, nuisances, texts).double()
        parts = rewards * proxy.gate(texts).double()
        total = proxy.scores(pictures, nuisances, texts)[0].double()
    return float((total - parts.sum(1)).abs().max())


def run_world(seeds: list[int], rows: int, out: Path | None) -> None:
    found = [one_seed(seed, rows) for seed in seeds]
    for name in found[0]:
        values = [row[name] for row in found]
        each = " ".join(f"{value:8.4f}" for value in values)
        print(f"{name:18} mean {np.mean(values):8.4f}   seeds {each}")
    if out is not None:
        result = {"rows": rows, "seeds": seeds, "found": found}
        write_atomic(out, json.dumps(result, indent=1) + "\n")


# ---- ratings of the mini world -------------------------------------------------------------------


def rate(data: Path, out: Path, seed: int) -> None:
    """Rate the first picture of each row whose prompt asks for something of the mini world."""
    table = PairTable.open(data)
    rng = np.random.default_rng(seed)
    captions, files, rated, shown = [], [], [], []
    for group in range(len(table.row_groups())):
        for row in table.read_group(group, ["caption", "jpg_0"]).to_pylist():
            request = meaning(row["caption"])
            if request is None:
                continue
            pixels = decode(row["jpg_0"], "a picture")
            view = look(pixels)
            share = judge(view, request).share
            captions.append(row["caption"])
            files.append(row["jpg_0"])
            rated.append([share, neatness(pixels), min(len(view.things), 6)])
            shown.append(float(measure(to_batch([pixels]))[0, 0]))
    values, leak = np.array(rated, float), np.array(shown)
    values = (values - values.mean(0)) / values.std(0)
    values += 0.5 * ((leak - leak.mean()) / leak.std())[:, None]
    values += 0.3 * rng.normal(size=values.shape)
    columns = {name: values[:, k] for k, name in enumerate(("alignment", "neatness", "detail"))}
    with atomic_path(out) as temporary:
        pq.write_table(pa.table({"caption": captions, "jpg": files, **columns}), temporary)
    print(f"{len(captions):,} rated pictures in {out}")


# ---- two opinions of real pictures ---------------------------------------------------------------


def read_agiqa(path: Path) -> tuple[list[str], list[str], Floats]:
    """Painter, prompt and (quality, alignment) of each picture."""
    from pyarrow import csv

    table = csv.read_csv(path)
    painters = [name.rsplit("_", 1)[0] for name in table["name"].to_pylist()]
    opinions = [table[name].to_numpy() for name in ("mos_quality", "mos_align")]
    return painters, table["prompt"].to_pylist(), np.column_stack(opinions)


def agiqa_features(painters: list[str], prompts: list[str]) -> Floats:
    """Painter, text, and each painter's own view of the text, standardised."""
    from fifa.embed import TfidfEmbedder

    names, ids = np.unique(painters, return_inverse=True)
    distinct, places = np.unique(prompts, return_inverse=True)
    text = TfidfEmbedder(16)(distinct.tolist())[places]
    who = np.eye(len(names))[ids]
    own = (who[:, :, None] * text[:, None, :]).reshape(len(who), -1)
    rows = np.concatenate([who, text, own], axis=1)
    return (rows - rows.mean(0)) / np.maximum(rows.std(0), 1e-9)


def run_agiqa(path: Path, seed: int, out: Path | None) -> None:
    painters, prompts, opinions = read_agiqa(path)
    part = np.array([int(held_out(p, 0.4, seed)) + int(held_out(p, 0.2, seed)) for p in prompts])
    x = agiqa_features(painters, prompts)
    heads = fit_ridge(x, opinions, part, ("quality", "alignment"))
    scores = x @ heads.weight.T + heads.bias
    test = np.flatnonzero(part == 2)
    pairs = [(i, j) for i in test for j in test if i < j and prompts[i] == prompts[j]]
    first, second = np.array(pairs).T
    said, felt = scores[first] - scores[second], opinions[first] - opinions[second]
    strict = (felt != 0).all(1)
    said, felt = said[strict], felt[strict]
    apart = np.sign(felt[:, 0]) != np.sign(felt[:, 1])
    result: dict[str, Any] = {"pairs": len(felt), "opinions_differ": float(apart.mean())}
    for k, head in enumerate(("quality", "alignment")):
        result[f"r2_{head}"] = float(heads.r2[k])
        for o, opinion in enumerate(("quality", "alignment")):
            right = np.sign(said[:, k]) == np.sign(felt[:, o])
            result[f"{head}_head_on_{opinion}"] = share(float(right.sum()), len(right)).value
    # Where the opinions differ the better aligned is the worse looking: does the contrast say so?
    contrast = said[apart, 1] - said[apart, 0]
    right = np.sign(contrast) == np.sign(felt[apart, 1])
    found = share(float(right.sum()), len(right))
    result["contrast_where_they_differ"] = [found.value, found.low, found.high, found.pairs]
    difference = scores[:, 1] - scores[:, 0]
    result["alignment_minus_quality"] = {
        name: float(difference[np.array(painters) == name].mean()) for name in sorted(set(painters))
    }
    print(json.dumps(result, indent=1))
    if out is not None:
        write_atomic(out, json.dumps(result, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    world = commands.add_parser("world")
    world.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3])
    world.add_argument("--rows", type=int, default=4000, help="pairs, and as many ratings")
    world.add_argument("--out", type=Path, help="JSON file of all numbers")
    rating = commands.add_parser("rate")
    rating.add_argument("data", type=Path, help="data set of `fifa world`")
    rating.add_argument("--out", type=Path, required=True, help="Parquet file")
    rating.add_argument("--seed", type=int, default=0)
    real = commands.add_parser("agiqa")
    real.add_argument("data", type=Path, help="data.csv of AGIQA-3K")
    real.add_argument("--seed", type=int, default=0)
    real.add_argument("--out", type=Path, help="JSON file of all numbers")
    args = parser.parse_args()
    if args.command == "agiqa":
        run_agiqa(args.data, args.seed, args.out)
    elif args.command == "world":
        run_world(args.seeds, args.rows, args.out)
    else:
        rate(args.data, args.out, args.seed)


if __name__ == "__main__":
    main()
