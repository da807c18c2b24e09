"""What selection costs at full size: every stage against the matrix product that it needs.

    python benchmarks/filter.py --out results/filter.json

Vectors stand for embeddings of prompts. They are drawn from topics of Zipf sizes; in each topic
people hold sessions, in which they send one prompt and then edits of it, 0.03 to 0.9 away; all with
a spectrum that falls like 1 / sqrt(i). Pairs fall on prompts by Zipf's law as well. The medians of
the distance to the nearest and the 5th nearest are 0.3 and 0.7, the log of the latter spreads by
0.4; for TF-IDF vectors of 12,000 Pick-a-Pic prompts it is 0.5, 0.8 and 0.5.

Times are processor seconds: with OMP_NUM_THREADS=1 those of one core. Each part runs in a process
of its own, whose peak memory is recorded.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from fifa.knn import EXACT_UP_TO, find_neighbours, nearest
from fifa.knn.approximate import recall
from fifa.selection import (
    SELECTORS,
    Terms,
    importance,
    lazy_greedy,
    make_terms,
    objective,
    stochastic_greedy,
    top_k,
)

T = TypeVar("T")


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    pairs: int = 1_000_000
    prompts: int = 60_000
    dim: int = 768
    keep: int = 5_000
    stepwise: int = 20_000  # prompts that exact greedy is run on, at equal shares
    indexed: int = 20_000  # rows that all indexes are tried on
    many: int = 1_000_000  # rows for the approximate index


SMALL = Size(20_000, 1_500, dim=64, keep=100, stepwise=1_000, indexed=1_500, many=5_000)
NEIGHBOURS = 5


# ---- data ----------------------------------------------------------------------------------------


def embeddings(count: int, dim: int, seed: int = 0) -> np.ndarray:
    """Unit vectors (count, dim): topics, sessions in them, edits in these."""
    rng = np.random.default_rng(seed)
    spectrum = (np.arange(1, dim + 1) ** -0.5).astype(np.float32)
    spectrum /= np.linalg.norm(spectrum)

    def noise(rows: int) -> np.ndarray:
        return rng.standard_normal((rows, dim), dtype=np.float32) * spectrum

    session = np.cumsum(rng.random(count) < 0.4)
    topics = max(8, count // 100)
    share = np.arange(1, topics + 1) ** -0.8
    topic = rng.choice(topics, size=session[-1] + 1, p=share / share.sum())
    first = unit(noise(topics)[topic] + 0.7 * noise(len(topic)))
    x = np.empty((count, dim), dtype=np.float32)
    place = rng.permutation(count)
    for start in range(0, count, 20_000):
        part = slice(start, start + 20_000)
        edit = np.exp(rng.uniform(np.log(0.03), np.log(0.9), size=len(place[part])))
        away = edit[:, None].astype(np.float32) * noise(len(edit))
        x[place[part]] = unit(first[session[part]] + away)
    return x


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def scored(size: Size, seed: int = 1) -> dict[str, np.ndarray]:
    """Rewards, text quality and prompt of each pair."""
    rng = np.random.default_rng(seed)
    share = np.arange(1, size.prompts + 1) ** -0.7
    prompt = rng.choice(size.prompts, size=size.pairs, p=share / share.sum())
    win = rng.normal(size=size.pairs)
    quality = np.clip(rng.normal(6, 2, size=size.prompts), 0, 10)
    lose = win - 0.5 - rng.normal(size=size.pairs)
    return {"win": win, "lose": lose, "quality": quality[prompt], "prompt": prompt}


def terms_from(size: Size, x: np.ndarray, log_distance: np.ndarray) -> Terms:
    pairs = scored(size)
    return make_terms(**pairs, log_knn=log_distance[pairs["prompt"]], vectors=x)


# ---- the obvious ways ----------------------------------------------------------------------------


def product_seconds(x: np.ndarray, rows: int) -> float:
    """Seconds that the fastest library takes for x[:rows] @ x.T in float32, in blocks."""
    import torch

    tensor = torch.from_numpy(x)
    blocks = [slice(start, min(start + 512, rows)) for start in range(0, rows, 512)]
    products: tuple[Callable[[slice], Any], ...] = (
        lambda block: x[block] @ x.T,
        lambda block: tensor[block] @ tensor.T,
    )
    fastest = min(products, key=lambda product: timed(lambda: product(blocks[0]))[1])
    return sum(timed(partial(fastest, block))[1] for block in blocks)


def plain_greedy(terms: Terms, k: int) -> np.ndarray:
    """Exact greedy by its definition, one pair a prompt: every gain anew at every pick."""
    x = terms.vectors
    pair, value = best_pairs(terms)
    members: list[int] = []
    inside = np.empty(0, dtype=np.float32)
    while len(members) < k:
        near = np.full(len(x), np.log(2.0), dtype=np.float32)
        harm = np.zeros(len(x))
        for start in range(0, len(x) if members else 0, 2048):
            part = slice(start, start + 2048)
            to_part = logs(x[members] @ x[part].T, terms.floor)
            near[part] = np.minimum(near[part], to_part.min(axis=0))
            member, column = np.nonzero(to_part < inside[:, None])
            lost = to_part[member, column].astype(np.float64) - inside[member]
            harm[part] = np.bincount(column, lost, minlength=to_part.shape[1])
        p = first_best(terms, pair, value, near, harm)
        if members:
            inside = np.minimum(inside, logs(x[members] @ x[p], terms.floor))
        members.append(p)
        inside = np.append(inside, near[p])
        value[p] = -np.inf
    return pair[members]


def eager_greedy(terms: Terms, k: int) -> np.ndarray:
    """Exact greedy without bounds, one pair a prompt: gains of all prompts are kept up to date.

    Each pick multiplies all vectors with the new member and those it takes a neighbour from.
    """
    x = terms.vectors
    pair, value = best_pairs(terms)
    near = np.full(len(x), np.log(2.0), dtype=np.float32)
    harm = np.zeros(len(x))
    members: list[int] = []
    inside = np.empty(0, dtype=np.float32)
    while len(members) < k:
        p = first_best(terms, pair, value, near, harm)
        to_p = log_distances(x, p, terms.floor)
        nearer = np.flatnonzero(to_p[members] < inside)
        for i in nearer:
            to_i = log_distances(x, members[i], terms.floor)
            harm += np.minimum(0, to_i - to_p[members[i]]) - np.minimum(0, to_i - inside[i])
            inside[i] = to_p[members[i]]
        harm += np.minimum(0, to_p - near[p])
        members.append(p)
        inside = np.append(inside, near[p])
        near = np.minimum(near, to_p)
        value[p] = -np.inf
    return pair[members]


def best_pairs(terms: Terms) -> tuple[np.ndarray, np.ndarray]:
    """Of each prompt the pair of the largest margin + alpha quality, and that value."""
    own = terms.margin + terms.alpha * terms.quality
    best_first = np.lexsort((np.arange(len(own)), -own, terms.prompt))
    prompts = np.arange(len(terms.vectors))
    pair = best_first[np.searchsorted(terms.prompt[best_first], prompts).clip(max=len(own) - 1)]
    return pair, np.where(terms.prompt[pair] == prompts, own[pair], -np.inf)


def first_best(
    terms: Terms, pair: np.ndarray, value: np.ndarray, near: np.ndarray, harm: np.ndarray
) -> int:
    """The prompt of the largest gain, to six digits; of equal ones that of the first pair."""
    gains = np.round(value + terms.gamma / terms.spread * (near + harm - terms.centre), 6)
    ties = np.flatnonzero(gains == gains.max())
    return int(ties[np.argmin(pair[ties])])


def log_distances(x: np.ndarray, i: int, floor: float) -> np.ndarray:
    cosines = x @ x[i]
    cosines[i] = 1
    return logs(cosines, floor)


def logs(cosines: np.ndarray, floor: float) -> np.ndarray:
    """Log distances of unit vectors with those products."""
    return np.log(np.maximum(2 - 2 * cosines, np.float32(floor**2))) / 2


# ---- parts ---------------------------------------------------------------------------------------


def selection(size: Size) -> dict[str, Any]:
    """Stages from scored pairs to a kept set, and the product of all prompts with all."""
    x = embeddings(size.prompts, size.dim)
    some = len(x) // 4
    product = product_seconds(x, some) * len(x) / some
    (distances, _), compared = timed(lambda: nearest(x, NEIGHBOURS))
    log_distance = np.log(distances[:, -1])
    terms, made = timed(lambda: terms_from(size, x, log_distance))
    one_pass, chosen = timed(lambda: top_k(importance(terms), size.keep, terms.groups, 1))
    greedy, picked = timed(lambda: lazy_greedy(terms, size.keep, 1))
    _, measured = timed(lambda: [objective(each, terms) for each in (one_pass, greedy)])
    total = compared + made + chosen + picked + measured
    some = min(2_000, len(x))
    return {
        "seconds": {
            "float32 product of all prompts with all, from a fourth of the rows": product,
            "exact 5 nearest neighbours": compared,
            "terms": made,
            "one-pass choice": chosen,
            "greedy choice": picked,
            "f of both": measured,
            "all stages": total,
        },
        "all stages / product": total / product,
        "neighbours / product": compared / product,
        "faiss flat search / product": flat_search(x, some) / product * len(x) / some,
        "nearest distance, quantiles": quantiles(distances[:, 0]),
        "5th nearest distance, quantiles": quantiles(distances[:, -1]),
        "spread of the log of the latter": float(log_distance.std()),
    }


def flat_search(x: np.ndarray, rows: int) -> float:
    """Seconds of faiss's exhaustive search for some of the rows."""
    import faiss

    index = faiss.IndexFlatIP(x.shape[1])
    index.add(x)
    return timed(lambda: index.search(x[:rows], NEIGHBOURS + 1))[1]


def greedy(size: Size) -> dict[str, Any]:
    """f(S) and time of every method, beside exact greedy without bounds."""
    share = size.stepwise / size.prompts
    size = replace(
        size,
        prompts=size.stepwise,
        pairs=round(size.pairs * share),
        keep=round(size.keep * share),
    )
    x = embeddings(size.prompts, size.dim)
    terms = terms_from(size, x, np.log(nearest(x, NEIGHBOURS)[0][:, -1]))
    methods: dict[str, Callable[[], np.ndarray]] = {
        "lazy greedy": lambda: lazy_greedy(terms, size.keep, 1),
        "stochastic greedy": lambda: stochastic_greedy(terms, size.keep, 1),
        "exact greedy": lambda: plain_greedy(terms, size.keep),
        "exact greedy, gains kept up to date": lambda: eager_greedy(terms, size.keep),
    }
    for name in SELECTORS:
        if name not in ("greedy", "stochastic"):
            methods[name] = partial(SELECTORS[name].choose, terms, size.keep, 1, 0)
    rows, sets = {}, {}
    for name, choose in methods.items():
        sets[name], seconds = timed(choose)
        rows[name] = {**objective(sets[name], terms)._asdict(), "seconds": seconds}
    exact, kept = rows["exact greedy"], rows["exact greedy, gains kept up to date"]
    for row in rows.values():
        row["f / exact"] = row["f"] / exact["f"]
        row["time / exact"] = row["seconds"] / exact["seconds"]
        row["time / gains kept up to date"] = row["seconds"] / kept["seconds"]
    same = np.isin(sets["lazy greedy"], sets["exact greedy"])
    return {
        "size": asdict(size),
        "methods": rows,
        "share of the exact set in the lazy set": float(same.mean()),
    }


def indexes(size: Size) -> dict[str, Any]:
    """Exact search and both indexes on equal rows."""
    x = embeddings(size.indexed, size.dim)
    exact, seconds = timed(lambda: nearest(x, NEIGHBOURS)[0])
    rows: dict[str, Any] = {"exact": {"seconds": seconds, "recall": 1.0}}
    for index in ("ivf", "hnsw"):
        found, seconds = timed(partial(find_neighbours, x, NEIGHBOURS, index))
        rows[index] = {
            "seconds": seconds,
            "recall": recall(found.distances, exact),
            "recall on its sample": found.recall,
            "effort": found.effort,
        }
    return {"rows": len(x), "indexes": rows}


def million(size: Size) -> dict[str, Any]:
    """Distinct prompts beyond the size of exact search."""
    x = embeddings(size.many, size.dim)
    some = min(4_096, len(x))
    product = product_seconds(x, some) * len(x) / some
    index = "auto" if len(x) > EXACT_UP_TO else "ivf"
    found, seconds = timed(lambda: find_neighbours(x, NEIGHBOURS, index))
    sample = np.sort(np.random.default_rng(99).choice(len(x), min(1_000, len(x)), replace=False))
    truth, _ = nearest(x, NEIGHBOURS, sample)
    return {
        "rows": len(x),
        "index": found.index,
        "seconds": seconds,
        "float32 product of all with all, from 4,096 rows, seconds": product,
        "time / product": seconds / product,
        "cells looked into": found.effort,
        "recall on its sample": found.recall,
        "recall on 1,000 other rows": recall(found.distances[sample], truth),
    }


PARTS: dict[str, Callable[[Size], dict[str, Any]]] = {
    "selection": selection,
    "greedy": greedy,
    "indexes": indexes,
    "million": million,
}


# ---- running -------------------------------------------------------------------------------------


def timed(call: Callable[[], T]) -> tuple[T, float]:
    """The result, and the processor seconds of all threads, whoever else is busy."""
    start = time.process_time()
    result = call()
    return result, time.process_time() - start


def quantiles(x: np.ndarray) -> list[float]:
    return np.quantile(x, [0.05, 0.25, 0.5, 0.75, 0.95]).round(3).tolist()


def run_part(name: str, options: list[str]) -> dict[str, Any]:
    """A part in its own process: its numbers, its peak memory, and how busy the machine was."""
    command = [sys.executable, __file__, "--part", name, *options]
    before = os.getloadavg()[0]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode != 0:
        sys.exit(f"part {name} ended with {ended.returncode}:\n{ended.stderr}")
    busy = {"before": before, "after": os.getloadavg()[0]}
    return {**json.loads(ended.stdout), "other work on the machine, load average": busy}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a thousandth of the work")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--part", choices=PARTS, help="run one part here and print its numbers")
    parser.add_argument("--many", type=int, help="rows of part million, 7.5 GB each million")
    parser.add_argument("--out", type=Path, help="JSON file; parts that are not run stay in it")
    args = parser.parse_args()
    size = SMALL if args.small else Size()
    size = replace(size, many=args.many or size.many)
    if args.part:
        nearest(embeddings(100, 32), 1)  # libraries are loaded before a clock runs
        numbers = PARTS[args.part](size)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(json.dumps({**numbers, "peak memory, GiB": round(peak, 2)}))
        return
    import torch

    results = json.loads(args.out.read_text()) if args.out and args.out.exists() else {}
    results["size"] = asdict(size)
    results["machine"] = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    results["threads"] = torch.get_num_threads()
    for name in args.parts:
        options = ["--many", str(size.many), *(["--small"] if args.small else [])]
        results[name] = run_part(name, options)
        print(f"{name}\n{json.dumps(results[name], indent=2)}", flush=True)
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
