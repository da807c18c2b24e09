"""Does an inverted path lead back to its picture? On scenes of the mini world, by the mini model.

    python benchmarks/inversion.py --pictures 64 --out FILE

For every number of steps and of calls a step: how far the deterministic sampler, started at the
path's noise, ends from the picture's latent (root of the mean square, as a share of the latents'
own), the spread of that noise (1 where it is what the sampler expects), and the error of the
network's guess of the noise, on the noisy and the clean half of the path, beside fresh noise.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d3po.families import guided, load_family
from d3po.likelihood import renoise_logp
from d3po.sampling import Predict, image_noise, invert, rollout
from d3po.schedule import Schedule
from fifa.config import write_atomic
from fifa.images import to_batch
from fifa.miniworld import phrase, render, sample_scene


def root(difference: Tensor, of: Tensor) -> float:
    """Root mean square, as a share of that of `of`."""
    return float(difference.square().mean().sqrt() / of.square().mean().sqrt())


def measured(
    predict: Predict, schedule: Schedule, x_0: Tensor, steps: int, calls: int
) -> dict[str, Any]:
    """One setting."""
    grid = schedule.grid(steps, 0.0)
    path = invert(predict, grid, schedule, x_0, calls)
    back = rollout(predict, grid, schedule, path[:, 0], lambda step: torch.zeros(()))
    errors: dict[str, list[float]] = {"inverted": [], "fresh": []}
    fresh = image_noise(range(len(x_0)), x_0.shape[1:], 0)
    for i in range(steps):
        t = grid.times[[i] * len(x_0)]
        alpha, sigma = (float(value[0]) for value in schedule.alpha_sigma(t))
        own = (path[:, i] - alpha * x_0) / sigma
        for name, noise in (("inverted", own), ("fresh", fresh)):
            logp = renoise_logp(predict, schedule, x_0, noise[:, None], t[:, None])
            errors[name].append(-2 * float(logp.mean()))
    halves = slice(steps // 2), slice(steps // 2, steps)
    return {
        "steps": steps,
        "calls_a_step": calls,
        "error_back": round(root(back.x0 - x_0, x_0), 4),
        "noise_std": round(float(path[:, 0].std()), 4),
        "mse": {
            name: [round(float(np.mean(own[half])), 4) for half in halves]
            for name, own in errors.items()
        },
    }


@torch.no_grad()
def main() -> None:
    """A line a setting; the table as JSON when asked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 50])
    parser.add_argument("--calls", type=int, nargs="+", default=[1, 3, 10])
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    family, rng = load_family("mini"), np.random.default_rng(3)
    scenes = [sample_scene(rng) for _ in range(given.pictures)]
    x_0 = family.encode_images(to_batch([render(scene) for scene, _ in scenes]))
    cond = family.encode_text([phrase(request, rng) for _, request in scenes])
    predict = guided(family, family.denoiser, cond)
    table = []
    for steps in given.steps:
        for calls in given.calls:
            table.append(measured(predict, family.schedule, x_0, steps, calls))
            print(json.dumps(table[-1]), flush=True)
    if given.out:
        write_atomic(given.out, json.dumps({"pictures": given.pictures, "table": table}) + "\n")


if __name__ == "__main__":
    main()
