"""One denoising step: its mean and spread, drawing it, scoring it; and a whole rollout.

A step of the sampler is a Gaussian, p(x_s | x_t) = N(mean, sigma^2 I), so a path of T steps has a
log-probability under any network that could have walked it. Sampling and scoring share
`step_mean`, and `rollout` scores the very tensor it stored, so rescoring a trajectory under
unchanged weights gives the stored numbers bit for bit.

Axis letters: B images, T steps of a path, C H W of a latent. Times and sigmas are on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from d3po.schedule import Schedule, TimeGrid, per_image
from fifa.config import InputError

Predict = Callable[[Tensor, Tensor], Tensor]
"""predict(x_t (B, C, H, W), t (B,)) -> the network output (B, C, H, W).

t is of the schedule's `time_dtype`: long for DDPM, float64 for a flow.
"""

Reduce = Literal["mean", "sum"]
"""How the log-densities of the C*H*W elements become one number per image.

"sum" is the log-probability in nats. "mean" is that per element; beta and clip of the published
D3PO and DDPO code presume it.
"""


def step_mean(
    grid: TimeGrid, schedule: Schedule, i: int | Tensor, x_t: Tensor, pred: Tensor
) -> Tensor:
    """Mean of x_s given x_t and the network output at x_t, as the grid mixes image and noise.

        mean = to_x0 * x0 + to_eps * eps

    For `ddim_grid` it is DDIM (Song et al. 2021) eq. 12: to_x0 = sqrt(abar_s) and to_eps =
    sqrt(1 - abar_s - sigma^2). For `flow_grid` it is the drift of Flow-GRPO's SDE.
    `i` is the step, one for all or (B,) one per image; x_t and pred are (B, ...). Computed in the
    dtype of x_t: float32, or float64 for tests.
    """
    rows = _rows(i, len(x_t))
    x0, eps = schedule.to_x0_eps(pred, x_t, grid.times[rows])
    return per_image(grid.to_x0[rows], x_t) * x0 + per_image(grid.to_eps[rows], x_t) * eps


def logp(x_s: Tensor, mean: Tensor, sigma: Tensor, reduce: Reduce = "mean") -> Tensor:
    """log N(x_s; mean, sigma^2 I) of each image, (B,), in the dtype of x_s (float32 in practice).

    x_s and mean are (B, ...), sigma is (B,); `reduce` is "mean" per element or "sum" in nats.
    Raises InputError where sigma is 0: a deterministic step has no density.
    """
    if bool((sigma <= 0).any()):
        raise InputError(
            "a step with sigma 0 has no log-probability: use eta > 0, and leave out the last step"
            " where the path ends without noise (see TimeGrid.stochastic)"
        )
    if reduce not in ("mean", "sum"):
        raise InputError(f"reduce is {reduce!r}, it must be 'mean' (per element) or 'sum' (nats)")
    spread = per_image(sigma, x_s)
    mean = mean.to(x_s.dtype)
    density = -0.5 * ((x_s - mean) / spread) ** 2 - spread.log() - 0.5 * math.log(2 * math.pi)
    flat = density.flatten(1)
    return flat.mean(1) if reduce == "mean" else flat.sum(1)


def step_logp(
    predict: Predict,
    grid: TimeGrid,
    schedule: Schedule,
    i: int | Tensor,
    x_t: Tensor,
    x_s: Tensor,
    reduce: Reduce = "mean",
) -> Tensor:
    """log p(x_s | x_t) under `predict`, (B,): one network call; `i` as in `step_mean`."""
    rows = _rows(i, len(x_t))
    pred = predict(x_t, grid.times[rows])
    return logp(x_s, step_mean(grid, schedule, rows, x_t, pred), grid.sigma[rows], reduce)


@dataclass(frozen=True, eq=False)
class Trajectory:
    """Paths of B images over one grid, and how likely the policy that walked them found each step.

    `logp` is the score of exactly the stored latents; it is NaN at steps without a density
    (`grid.stochastic` lists those with one).
    """

    latents: Tensor  # (B, T+1, C, H, W) float32, x_T first, the clean latent last
    grid: TimeGrid
    logp: Tensor  # (B, T) float32
    reduce: Reduce

    @property
    def x0(self) -> Tensor:
        """The clean latents, (B, C, H, W)."""
        return self.latents[:, -1]


@torch.no_grad()
def rollout(
    predict: Predict,
    grid: TimeGrid,
    schedule: Schedule,
    x_T: Tensor,
    noise: Callable[[int], Tensor],
    reduce: Reduce = "mean",
) -> Trajectory:
    """Walk B paths from x_T (B, C, H, W) float32 down the grid; `noise(i)` is drawn for step i.

    `noise` returns (B, C, H, W), see `path_noise`; it is not called at steps with sigma 0.
    """
    latents = [x_T.float()]
    scores = []
    for i in range(len(grid)):
        x_t = latents[-1]
        rows = _rows(i, len(x_t))
        mean = step_mean(grid, schedule, rows, x_t, predict(x_t, grid.times[rows]))
        if grid.sigma[i] > 0:
            x_s = mean + float(grid.sigma[i]) * noise(i).to(mean)
            scores.append(logp(x_s, mean, grid.sigma[rows], reduce))
        else:
            x_s = mean
            scores.append(torch.full_like(mean[:, 0, 0, 0], math.nan))
        latents.append(x_s)
    return Trajectory(torch.stack(latents, 1), grid, torch.stack(scores, 1), reduce)


@torch.no_grad()
def invert(
    predict: Predict, grid: TimeGrid, schedule: Schedule, x_0: Tensor, iterations: int = 1
) -> Tensor:
    """Walk pictures x_0 (B, C, H, W) up a deterministic grid: (B, T+1, C, H, W), x_T first.

    A step down is linear in x_t and in the prediction, x_s = c x_t + mean(0, pred), and is solved
    for x_t. The prediction at x_t is needed before x_t is known: it is taken at x_s instead (DDIM
    inversion, Song et al. 2021, section 4.3), and with more `iterations` again at the x_t just
    found, whose fixed point is the exact inverse (Pan et al. 2023). In the dtype of x_0, in the
    order in which `rollout` stores paths. Raises InputError for a grid with noise, or with a step
    that forgets where it came from.
    """
    if grid.stochastic:
        raise InputError("only a deterministic path can be inverted: use eta 0")
    latents = [x_0]
    for i in reversed(range(len(grid))):
        x_s = x_t = latents[-1]
        rows, one = _rows(i, len(x_0)), torch.ones(1, 1, dtype=torch.float64)
        kept = float(step_mean(grid, schedule, i, one, torch.zeros_like(one)))
        if not kept:
            raise InputError(
                "this model's last step keeps nothing of the latent before it (prediction 'sample'"
                " with set_alpha_to_one): its paths cannot be inverted"
            )
        for _ in range(iterations):
            pred = predict(x_t, grid.times[rows])
            x_t = (x_s - step_mean(grid, schedule, rows, torch.zeros_like(x_s), pred)) / kept
        latents.append(x_t)
    return torch.stack(latents[::-1], 1)


def image_noise(seeds: Sequence[int], shape: Sequence[int], step: int) -> Tensor:
    """Standard normal noise (B, *shape), float32 on the CPU, a stream per image and step.

    `seeds` holds one integer in [0, 2^64) per image; `step` is the step index, -1 for x_T. The
    stream of an image is Philox keyed by the pair (seed, step + 1), so no two pairs collide and an
    image's noise depends neither on its neighbours in the batch nor on the number or kind of
    devices. (A torch CPU generator keeps only the low 32 bits of its seed, where ten thousand
    images of twenty steps would be expected to collide several times.)
    """
    if step < -1:
        raise ValueError(f"step must be -1 (x_T) or a step index, got {step}")
    noise = np.empty((len(seeds), *shape), dtype=np.float32)
    for row, seed in zip(noise, seeds, strict=True):
        if not 0 <= seed < 2**64:
            raise InputError(f"an image seed is {seed}, it must lie in [0, 2^64)")
        key = np.array([seed, step + 1], dtype=np.uint64)
        np.random.Generator(np.random.Philox(key=key)).standard_normal(dtype=np.float32, out=row)
    return torch.from_numpy(noise)


def path_noise(seeds: Sequence[int], shape: Sequence[int]) -> Callable[[int], Tensor]:
    """The `noise` of `rollout` for images with these path seeds.

    Images of a group start from one x_T and then part: give them equal seeds in
    `image_noise(start_seeds, shape, -1)` and different ones here.
    """
    return lambda step: image_noise(seeds, shape, step)


def _rows(i: int | Tensor, batch: int) -> Tensor:
    """Step indices (B,) long on the CPU."""
    rows = torch.full((batch,), i) if isinstance(i, int) else i.cpu()
    if rows.shape != (batch,):
        raise ValueError(f"expected one step per image, shape ({batch},), got {tuple(rows.shape)}")
    return rows
