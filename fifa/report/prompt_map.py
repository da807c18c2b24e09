"""A map of the prompts: near on paper what is near in the embedding, the kept ones marked.

t-SNE (van der Maaten & Hinton 2008) of a bounded sample, begun from the first two principal
components, so that the same prompts give the same map. A thin line joins each prompt to its nearest
neighbour on the map, so that one sees where paper and embedding disagree.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fifa.knn import Vectors

KEPT_SHOWN = 400
OTHERS_SHOWN = 800
PERPLEXITY = 30.0  # about how many neighbours t-SNE keeps near
FEWEST = 12  # below that, principal components are the map
WIDTH, HEIGHT, EDGE = 900, 560, 14  # of the drawing, and the space around its points

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class PromptMap:
    """Where M sampled prompts lie, out of P."""

    prompt: Ints  # (M,) rows of the embeddings; the kept come last, to be drawn on top
    kept: NDArray[np.bool_]  # (M,)
    place: Floats  # (M, 2) in units of the drawing, rounded
    nearest: Ints  # (M,) which of the M is nearest in the embedding; -1 for a lone prompt
    distance: Floats  # (M,) to it, of at most 2
    kept_of: int  # how many prompts there were to sample from
    others_of: int


def prompt_map(vectors: Vectors, kept: NDArray[np.bool_], seed: int = 0) -> PromptMap:
    """The map of unit vectors (P, D), of which those marked `kept` (P,) were kept."""
    rng = np.random.default_rng(seed)
    parts = (np.flatnonzero(~kept), OTHERS_SHOWN), (np.flatnonzero(kept), KEPT_SHOWN)
    prompt = np.concatenate([np.sort(rng.permutation(all_)[:most]) for all_, most in parts])
    x = vectors[prompt].astype(np.float64)
    nearest, distance = _nearest(x)
    return PromptMap(
        prompt=prompt,
        kept=kept[prompt],
        place=_fitted(_layout(x)),
        nearest=nearest,
        distance=distance,
        kept_of=int(kept.sum()),
        others_of=int((~kept).sum()),
    )


def _nearest(x: Floats) -> tuple[Ints, Floats]:
    if len(x) == 1:
        return np.array([-1]), np.array([np.nan])
    cosine = x @ x.T
    np.fill_diagonal(cosine, -np.inf)
    nearest = cosine.argmax(axis=1)
    return nearest, np.linalg.norm(x - x[nearest], axis=1)


def _layout(x: Floats) -> Floats:
    """(M, D) -> (M, 2) by t-SNE, on one thread: sums of threads round in any order."""
    start = _principal(x)
    if len(x) < FEWEST or not start.std(axis=0).all():
        return start
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    tsne = TSNE(
        init=(1e-4 * start / start.std(axis=0)[0]).astype(np.float32),
        perplexity=min(PERPLEXITY, (len(x) - 1) / 3),
        max_iter=500,
        random_state=0,
    )
    with threadpool_limits(limits=1):
        return tsne.fit_transform(x.astype(np.float32)).astype(np.float64)


def _principal(x: Floats) -> Floats:
    """The first two principal components (M, 2), each with its largest value above 0."""
    left, strength, _ = np.linalg.svd(x - x.mean(axis=0), full_matrices=False)
    found = np.zeros((len(x), 2))
    count = min(2, len(strength))
    found[:, :count] = left[:, :count] * strength[:count]
    largest = found[np.abs(found).argmax(axis=0), [0, 1]]
    return found * np.where(largest < 0, -1.0, 1.0)


def _fitted(place: Floats) -> Floats:
    """Moved and stretched into the drawing, to a tenth of its unit."""
    low, high = place.min(axis=0), place.max(axis=0)
    room = np.array([WIDTH, HEIGHT]) - 2 * EDGE
    unit = (place - low) / np.where(high > low, high - low, 1.0)
    return np.round(EDGE + np.where(high > low, unit, 0.5) * room, 1)


def html_map(found: PromptMap, prompts: Sequence[str]) -> str:
    """The map as inline SVG; hovering tells a prompt and how near its neighbour is."""
    lines = "".join(
        f"M{x:g} {y:g}L{found.place[j, 0]:g} {found.place[j, 1]:g}"
        for (x, y), j in zip(found.place.tolist(), found.nearest.tolist(), strict=True)
        if j >= 0
    )
    points = "".join(
        f'<circle cx="{x:g}" cy="{y:g}" r="{5 if kept else 3}"{" class=marked" if kept else ""}>'
        f"<title>{html.escape(_told(prompt, kept, distance))}</title></circle>\n"
        for (x, y), kept, distance, prompt in zip(
            found.place.tolist(), found.kept.tolist(), found.distance.tolist(), prompts, strict=True
        )
    )
    label = f"Map of {len(found.prompt):,} prompts, {int(found.kept.sum()):,} of them kept"
    return (
        f'<div class="scroll"><svg class="map" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{label}">\n<path d="{lines}"/>\n{points}</svg></div>'
    )


def _told(prompt: str, kept: bool, distance: float) -> str:
    near = f", nearest shown at {distance:.2f}" if np.isfinite(distance) else ""
    short = prompt if len(prompt) <= 200 else prompt[:199] + "…"
    return f"{'kept' if kept else 'not kept'}{near}: {short}"


MAP_STYLE = """
.map { width: 100%; min-width: 34rem; background: var(--card); border: 1px solid var(--line);
  border-radius: .6rem; display: block; }
.map path { stroke: var(--soft); stroke-width: .8; opacity: .35; fill: none; }
.map circle { fill: var(--soft); opacity: .6; }
.map circle.marked { fill: var(--mark); opacity: 1; stroke: var(--card); stroke-width: 1; }
.map circle:hover { stroke: var(--ink); stroke-width: 2; opacity: 1; }
.key { color: var(--soft); font-size: .9rem; } .key b { display: inline-block; width: .7rem;
  height: .7rem; border-radius: 50%; background: var(--soft); opacity: .6;
  margin: 0 .3rem 0 .8rem; }
.key b:first-child { margin-left: 0; } .key b.marked { background: var(--mark); opacity: 1; }
"""
