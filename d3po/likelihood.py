"""How likely does a policy find an image? Two answers, the same shape: (B, S) log-probabilities.

`path_logp` scores the denoising path an image was made along (D3PO): exact Gaussian transitions,
but only for images whose path was stored. `renoise_logp` noises a finished image afresh and scores
the network's guess of that noise (Diffusion-DPO): a bound, but good for any image.

Both are handed a `predict` and know nothing of text, guidance or optimizers. S is the number of
steps (or noise levels) scored; each costs one network call over B images unless they are scored
together, and with gradients enabled each keeps its graph, so a caller short of memory passes one
step at a time.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from d3po.sampling import Predict, Reduce, logp, step_logp, step_mean
from d3po.schedule import Schedule, TimeGrid
from fifa.config import InputError


def path_logp(
    predict: Predict,
    grid: TimeGrid,
    schedule: Schedule,
    latents: Tensor,
    steps: Tensor,
    reduce: Reduce = "mean",
    together: bool = False,
) -> Tensor:
    """log p(x_s | x_t) of the stored steps, (B, S) (D3PO, Yang et al. 2024, eq. 14).

    `latents` (B, T+1, C, H, W) float32 as `rollout` stored them; `steps` (S,) step indices for all
    images, or (B, S) for each its own. Under the weights of the rollout, and in the same batch,
    the result equals `Trajectory.logp[:, steps]` bit for bit. `together` scores all S steps in one
    call of `predict` over S * B rows, the B images of the first step first: faster, with the memory
    of the larger batch, and equal up to rounding.
    """
    batch, length = latents.shape[:2]
    if length != len(grid) + 1:
        raise ValueError(f"{length} latents do not fit the {len(grid)} steps of the grid")
    steps = steps.cpu()
    steps = steps.expand(batch, -1) if steps.ndim == 1 else steps
    columns = [steps.T.reshape(-1)] if together else steps.unbind(1)
    scores = []
    for i in columns:
        image = torch.arange(len(i)) % batch
        x_t, x_s = latents[image, i], latents[image, i + 1]
        scores.append(step_logp(predict, grid, schedule, i, x_t, x_s, reduce))
    return torch.cat(scores).view(-1, batch).T


class PathScore(NamedTuple):
    """What is known of the stored steps under one network."""

    logp: Tensor  # (B, S)
    mean: Tensor  # (B, S, C, H, W) means of the steps' Gaussians, in units of their sigma


def path_score(
    predict: Predict,
    grid: TimeGrid,
    schedule: Schedule,
    latents: Tensor,
    steps: Tensor,
    reduce: Reduce = "mean",
) -> PathScore:
    """`path_logp` of steps (S,), with the means that `gaussian_kl` compares; no further call."""
    scores, means = [], []
    for i in steps.tolist():
        x_t, x_s = latents[:, i], latents[:, i + 1]
        rows = torch.full((len(x_t),), i)
        mean = step_mean(grid, schedule, rows, x_t, predict(x_t, grid.times[rows]))
        scores.append(logp(x_s, mean, grid.sigma[rows], reduce))
        means.append(mean / float(grid.sigma[i]))
    return PathScore(torch.stack(scores, 1), torch.stack(means, 1))


def gaussian_kl(mean: Tensor, other: Tensor, reduce: Reduce = "mean") -> Tensor:
    """KL(N(mean, I) || N(other, I)) = |mean - other|^2 / 2 of each image and step, (B, S).

    Means (B, S, C, H, W) in units of the common sigma, as in `PathScore`; in nats for "sum", in
    nats per element for "mean".
    """
    squares = (mean - other).square().flatten(2)
    return 0.5 * (squares.mean(2) if reduce == "mean" else squares.sum(2))


def log_peak(grid: TimeGrid, steps: Tensor, elements: int, reduce: Reduce = "mean") -> Tensor:
    """The log-density of each step at its mean, (S,): the largest that `path_logp` can give.

    It does not depend on the network; less it, log-probabilities of different steps are at most 0.
    """
    peak = -grid.sigma[steps].log() - 0.5 * math.log(2 * math.pi)
    return peak if reduce == "mean" else elements * peak


def renoise_logp(
    predict: Predict,
    schedule: Schedule,
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    reduce: Reduce = "mean",
) -> Tensor:
    """-1/2 ||target - pred||^2 at fresh noise, (B, S) (Diffusion-DPO, Wallace et al. 2023, eq. 14).

    x0 (B, C, H, W) clean latents, noise (B, S, C, H, W), t (B, S) of the schedule's `time_dtype`.
    The target is the noise, v for a v-prediction network, the velocity for a flow. It is the
    log-density of N(target; pred, I) without its constant, so `dpo(..., beta)` on "mean" values is
    the published loss at the published beta (2000 to 5000):
    inside = -beta/2 * ((mse_w - mse_l)_policy - (mse_w - mse_l)_ref).
    The two images of a pair share t and noise, policy and reference too: what is compared is the
    images, not the draws.
    """
    if reduce not in ("mean", "sum"):
        raise InputError(f"reduce is {reduce!r}, it must be 'mean' (per element) or 'sum' (nats)")
    columns = []
    for eps, times in zip(noise.unbind(1), t.unbind(1), strict=True):
        pred = predict(schedule.add_noise(x0, eps, times), times)
        error = (schedule.target(x0, eps, times) - pred.to(x0.dtype)).square().flatten(1)
        columns.append(-0.5 * (error.mean(1) if reduce == "mean" else error.sum(1)))
    return torch.stack(columns, 1)
