"""Draws without state: every random choice is a function of a seed and of its place in the run.

So nothing has to be saved to repeat a draw, and a result depends neither on what was drawn before
nor on how many processes share the work. Noise itself comes from `sampling.image_noise`, which
takes the seeds made here.
"""

from __future__ import annotations

import numpy as np

from fifa.config import fingerprint


def derive_seed(*place: int | str) -> int:
    """A seed in [0, 2^63), a function of its arguments, e.g. (seed, "path", round, image)."""
    return int(fingerprint(*(str(part) for part in place)), 16) >> 1


def shuffled(seed: int, count: int, start: int, stop: int) -> list[int]:
    """Items start..stop-1 of an endless sequence: 0..count-1 once an epoch, reshuffled each time.

    Any slice can be asked for without the ones before it.
    """
    order: list[int] = []
    for epoch in range(start // count, -(-stop // count)):
        permutation = np.random.default_rng(derive_seed(seed, "epoch", epoch)).permutation(count)
        first, last = max(start - epoch * count, 0), min(stop - epoch * count, count)
        order += permutation[first:last].tolist()
    return order
