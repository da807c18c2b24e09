"""How well an embedder knows a reworded prompt again, and what it costs.

    python benchmarks/embeddings.py PROMPTS.txt [EMBEDDER ...]

PROMPTS.txt holds a prompt a line. Of 1,000 of them that have at least eight words, a fifth of the
words is dropped and two neighbours change places; the rewording is embedded together with all
prompts. Told are the time on the CPU, how often its nearest neighbour is the prompt that it was
made of (and how often that is among the nearest five), and how far apart rewordings and prompts
drawn at random lie.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

from fifa.embed import load_embedder
from fifa.pairs import distinct_prompts

PICKED = 1000
WORDS = 8  # least words of a prompt that is reworded


def reworded(prompt: str, rng: np.random.Generator) -> str:
    """The prompt without a fifth of its words, two neighbours exchanged."""
    words = prompt.split()
    dropped = set(rng.choice(len(words), len(words) // 5, replace=False).tolist())
    left = [word for place, word in enumerate(words) if place not in dropped]
    at = int(rng.integers(len(left) - 1))
    left[at], left[at + 1] = left[at + 1], left[at]
    return " ".join(left)


def measure(spec: str, prompts: list[str], picked: list[int], variants: list[str]) -> str:
    """A line of numbers about one embedder."""
    import faiss

    embedder, start = load_embedder(spec), time.process_time()
    vectors = embedder([*prompts, *variants])
    seconds = time.process_time() - start
    base, queries = vectors[: len(prompts)], vectors[len(prompts) :]
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(base)
    _, nearest = index.search(queries, 5)
    own = np.array(picked)[:, None]
    near = np.linalg.norm(base[picked] - queries, axis=1)
    a, b = np.random.default_rng(1).integers(len(prompts), size=(2, 20_000))
    apart = np.linalg.norm(base[a] - base[b], axis=1)
    return (
        f"{spec:14} {seconds:8.1f} {(nearest[:, :1] == own).mean():9.3f} "
        f"{(nearest == own).any(axis=1).mean():9.3f} {np.median(near):10.2f} "
        f"{np.median(apart):8.2f}"
    )


def main() -> None:
    """Measure each embedder and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompts", type=Path)
    parser.add_argument(
        "embedders", nargs="*", default=[f"tfidf:{dim}" for dim in (32, 64, 128, 256, 512)]
    )
    given = parser.parse_args()
    prompts, _ = distinct_prompts(given.prompts.read_text(encoding="utf-8").splitlines())
    rng = np.random.default_rng(0)
    order = rng.permutation(len(prompts)).tolist()
    picked = [place for place in order if len(prompts[place].split()) >= WORDS][:PICKED]
    variants = [reworded(prompts[place], rng) for place in picked]
    print(f"{len(prompts):,} distinct prompts, {len(picked):,} reworded")
    print("embedder        CPU s    first of five  distance: reworded, at random")
    for spec in given.embedders:
        print(measure(spec, prompts, picked, variants), flush=True)


if __name__ == "__main__":
    main()
