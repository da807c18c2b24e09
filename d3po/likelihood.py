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

import torch
from torch import Tensor

from d3po.sampling import Predict, Reduce, step_logp
from d3po.schedule import NoiseSchedule, TimeGrid
from fifa.config import InputError


def path_logp(
    predict: Predict,
    grid: TimeGrid,
    schedule: NoiseSchedule,
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


def renoise_logp(
    predict: Predict,
    schedule: NoiseSchedule,
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    reduce: Reduce = "mean",
) -> Tensor:
    """-1/2 ||target - pred||^2 at fresh noise, (B, S) (Diffusion-DPO, Wallace et al. 2023, eq. 14).

    x0 (B, C, H, W) clean latents, noise (B, S, C, H, W), t (B, S) long. The target is the noise,
    or v for a v-prediction network. It is the log-density of N(target; pred, I) without its
    constant, so `dpo(..., beta)` on "mean" values is the published loss at the published beta
    (2000 to 5000): inside = -beta/2 * ((mse_w - mse_l)_policy - (mse_w - mse_l)_ref).
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
