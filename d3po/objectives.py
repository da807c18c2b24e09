"""All preference objectives: pure functions of four log-probabilities, elementwise, unreduced.

    name(win, lose, ref_win, ref_lose, *, beta, ...) -> loss

`win` and `lose` are log-probabilities of the preferred and the rejected image under the policy,
`ref_*` those under the reference, all of one shape: (B,) per pair or (B, S) per pair and step. The
reference carries no gradient. In every equation below

    h = (win - ref_win) - (lose - ref_lose)

is how much more the policy has learnt to prefer the winner, in units of log-probability: nats, or
nats per element if the likelihood was reduced by "mean", which the published beta of D3PO (0.1)
and Diffusion-DPO (5000) presume. rho is the logistic function.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Objective = Callable[..., Tensor]


def dpo(win: Tensor, lose: Tensor, ref_win: Tensor, ref_lose: Tensor, *, beta: float) -> Tensor:
    """-log rho(beta * h): DPO (Rafailov et al. 2023, eq. 7); per step it is D3PO (eq. 14)."""
    return -F.logsigmoid(beta * _h(win, lose, ref_win, ref_lose))


def d3po_clipped(
    win: Tensor, lose: Tensor, ref_win: Tensor, ref_lose: Tensor, *, beta: float, clip: float = 0.1
) -> Tensor:
    """-log rho(beta * (log r_w - log r_l)), r = clamp(exp(logp - ref), 1 - clip, 1 + clip).

    D3PO as its authors' code computes it; eq. 14 of the paper has no clamp. Clamped here is the
    log-ratio, which is the same function without the overflow. Two consequences:

    * |beta * h| <= m = beta * log((1 + clip) / (1 - clip)), so the loss stays between
      -log rho(m) and -log rho(-m): 0.6832 to 0.7032 at beta = clip = 0.1. Watch `pair_metrics`.
    * An image whose ratio has left the band gets no gradient, also when it left it in the wrong
      direction: unlike PPO's minimum there is no unclamped term to pull it back.
    """
    low, high = math.log1p(-clip), math.log1p(clip)
    won = (win - ref_win).clamp(low, high)
    lost = (lose - ref_lose).clamp(low, high)
    return -F.logsigmoid(beta * (won - lost))


def ipo(win: Tensor, lose: Tensor, ref_win: Tensor, ref_lose: Tensor, *, beta: float) -> Tensor:
    """(h - 1 / (2 beta))^2: IPO (Azar et al. 2023, eq. 17), which stops at a margin."""
    return (_h(win, lose, ref_win, ref_lose) - 1 / (2 * beta)) ** 2


def hinge(win: Tensor, lose: Tensor, ref_win: Tensor, ref_lose: Tensor, *, beta: float) -> Tensor:
    """max(0, 1 - beta * h): the hinge of SLiC (Zhao et al. 2023) on h (RSO, Liu et al. 2023)."""
    return F.relu(1 - beta * _h(win, lose, ref_win, ref_lose))


def robust(
    win: Tensor,
    lose: Tensor,
    ref_win: Tensor,
    ref_lose: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.1,
) -> Tensor:
    """Unbiased for labels flipped with probability e = label_smoothing < 1/2.

    (-(1 - e) * log rho(beta * h) + e * log rho(-beta * h)) / (1 - 2e): rDPO (Chowdhury et al. 2024,
    eq. 12). Its mean over flips is `dpo` on the true labels.
    """
    logit = beta * _h(win, lose, ref_win, ref_lose)
    kept, flipped = F.logsigmoid(logit), F.logsigmoid(-logit)
    return (label_smoothing * flipped - (1 - label_smoothing) * kept) / (1 - 2 * label_smoothing)


def conservative(
    win: Tensor,
    lose: Tensor,
    ref_win: Tensor,
    ref_lose: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.1,
) -> Tensor:
    """-(1 - e) * log rho(beta * h) - e * log rho(-beta * h): cDPO (Mitchell 2023).

    Cross-entropy with a smoothed label: the policy is pulled to a preference of 1 - e, not to 1,
    and back from beyond it.
    """
    logit = beta * _h(win, lose, ref_win, ref_lose)
    kept, flipped = F.logsigmoid(logit), F.logsigmoid(-logit)
    return -(1 - label_smoothing) * kept - label_smoothing * flipped


OBJECTIVES: dict[str, Objective] = {
    "dpo": dpo,
    "d3po": dpo,
    "d3po_clipped": d3po_clipped,
    "ipo": ipo,
    "hinge": hinge,
    "robust": robust,
    "conservative": conservative,
}


def pair_metrics(
    win: Tensor,
    lose: Tensor,
    ref_win: Tensor,
    ref_lose: Tensor,
    beta: float,
    clip: float | None = None,
) -> dict[str, Tensor]:
    """What to watch instead of the loss; every value detached and of the inputs' shape, unreduced.

    implicit_accuracy  1 where h > 0, 1/2 where h = 0 (policy equals reference), else 0
    implicit_margin    beta * h
    win_ratio          win - ref_win: how far the winner has moved (log scale)
    lose_ratio         lose - ref_lose
    clipped_share      share of the two ratios outside [1 - clip, 1 + clip]; 0 without clip
    """
    won, lost = (win - ref_win).detach(), (lose - ref_lose).detach()
    h = won - lost
    clipped = torch.zeros_like(h)
    if clip is not None:
        low, high = math.log1p(-clip), math.log1p(clip)
        for ratio in (won, lost):
            clipped = clipped + 0.5 * ((ratio < low) | (ratio > high)).to(h.dtype)
    return {
        "implicit_accuracy": (h > 0).to(h.dtype) + 0.5 * (h == 0).to(h.dtype),
        "implicit_margin": beta * h,
        "win_ratio": won,
        "lose_ratio": lost,
        "clipped_share": clipped,
    }


def _h(win: Tensor, lose: Tensor, ref_win: Tensor, ref_lose: Tensor) -> Tensor:
    return (win - ref_win) - (lose - ref_lose)
