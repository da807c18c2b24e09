"""All preference objectives: pure functions of log-probabilities, elementwise, unreduced.

Four tables, by what an objective is told; all values have one shape, (B,) or (B, S):

    OBJECTIVES       name(win, lose, ref_win, ref_lose, *, beta, ...)  a pair, and the reference
    REFERENCE_FREE   name(win, lose, *, beta, ...)                     a pair alone
    UNPAIRED         name(logp, ref, desirable, baseline, *, ...)      an image liked or disliked
    POLICY_GRADIENT  name(logp, old, advantage, ...)                   an image with a reward

`win` and `lose` are log-probabilities of the preferred and the rejected image under the policy,
`ref_*` those under the reference. The reference carries no gradient. In the equations below

    h = (win - ref_win) - (lose - ref_lose)

is how much more the policy has learnt to prefer the winner, in units of log-probability: nats, or
nats per element if the likelihood was reduced by "mean", which the published beta of D3PO (0.1)
and Diffusion-DPO (5000) presume. rho is the logistic function.

An objective names its arguments after what it needs, and is handed that (see losses).
docs/methods.md compares them.
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


def sppo(win: Tensor, lose: Tensor, ref_win: Tensor, ref_lose: Tensor, *, beta: float) -> Tensor:
    """((win - ref_win) - 1/(2 beta))^2 + ((lose - ref_lose) + 1/(2 beta))^2.

    SPPO (Wu et al. 2024) with eta = 1 / beta, where the winner wins with probability 1 ("hard"):
    each image has a target of its own, so the winner cannot sink together with the loser.
    """
    target = 1 / (2 * beta)
    return (win - ref_win - target) ** 2 + (lose - ref_lose + target) ** 2


# ---- without a reference ------------------------------------------------------------------------
#
# Here `win` and `lose` are log-densities less their value at the mean, so at most 0: by re-noising
# -1/2 of the squared error anyway, along a path the Gaussian without its constant.


def simpo(win: Tensor, lose: Tensor, *, beta: float, gamma: float = 0.0) -> Tensor:
    """-log rho(beta * (win - lose) - gamma): SimPO (Meng et al. 2024, eq. 6).

    Its length normalisation is our "mean" per element; gamma is the margin it asks for.
    """
    return -F.logsigmoid(beta * (win - lose) - gamma)


def orpo(win: Tensor, lose: Tensor, *, beta: float) -> Tensor:
    """-win - beta * log rho(odds(win) - odds(lose)): ORPO (Hong et al. 2024, eq. 6, 7).

    odds(x) = x - log(1 - exp(x)), the log-odds of a probability exp(x) < 1; beta is its lambda.
    """
    return sft(win) - beta * F.logsigmoid(_log_odds(win) - _log_odds(lose))


def mapo(
    win: Tensor, lose: Tensor, *, beta: float, snr: float = 0.5, scale: float = 1000.0
) -> Tensor:
    """mse_w - beta * log rho(scale * (phi(snr * mse_w) - phi(snr * mse_l))), phi(x) = x/(e^x - 1).

    MaPO (Hong et al. 2024, "Margin-aware Preference Optimization for Aligning Diffusion Models
    without Reference") as its authors' code computes it, with mse = -2 * log-probability, the
    scale their 1000 times of the schedule, snr = 0.5 their constant.
    """
    mse_w, mse_l = -2 * win, -2 * lose
    margin = scale * (_phi(snr * mse_w) - _phi(snr * mse_l))
    return mse_w - beta * F.logsigmoid(margin)


def sft(win: Tensor) -> Tensor:
    """-win: more of what was preferred; `objective.sft` adds it, weighted, to any loss on pairs.

    As an anchor of the winner it is the NLL term of Pang et al. 2024 (iterative RPO).
    """
    return -win


def _log_odds(logp: Tensor) -> Tensor:
    """log(p / (1 - p)) of p = exp(logp) < 1, without cancellation near either end."""
    near_one = logp > -math.log(2)
    close = torch.log(-torch.expm1(torch.where(near_one, logp, -1.0)))
    far = torch.log1p(-torch.exp(torch.where(near_one, -1.0, logp)))
    return logp - torch.where(near_one, close, far)


def _phi(x: Tensor) -> Tensor:
    """x / (e^x - 1), written so that neither it nor its slope overflows; 1 - x/2 around 0."""
    small = x.abs() < 1e-4
    safe = torch.where(small, 1.0, x)
    return torch.where(small, 1 - x / 2, safe * torch.exp(-safe) / -torch.expm1(-safe))


# ---- one image at a time ------------------------------------------------------------------------


def kto(
    logp: Tensor,
    ref: Tensor,
    desirable: Tensor,
    baseline: Tensor,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """w * (1 - rho(d * beta * (logp - ref - baseline))): Diffusion-KTO (Li et al. 2024).

    d = `desirable` is 1 for a liked image and -1 for a disliked one, w the weight of its kind.
    `baseline` estimates the KL from the reference, max(0, mean of logp - ref over the update),
    without gradient: what counts as a gain or a loss is measured from there. The authors' code has
    -mse where ours is -mse/2: their beta of 1000 is 2000 here.
    """
    gain = desirable * (logp - ref - baseline.detach())
    weight = torch.where(desirable > 0, desirable_weight, undesirable_weight)
    return weight * (1 - torch.sigmoid(beta * gain))


def ddpo(logp: Tensor, old: Tensor, advantage: Tensor, *, clip: float = 1e-4) -> Tensor:
    """max(-A * r, -A * clamp(r, 1 - clip, 1 + clip)), r = exp(logp - old).

    DDPO-IS with PPO's clipping (Black et al. 2023, section 4.3). `old` are the log-probabilities
    under the policy that drew the path. The published clip of 1e-4 is for "mean" over the 16,384
    elements of SD at 512 px.
    """
    ratio = torch.exp(logp - old)
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))


def dpok(
    logp: Tensor, old: Tensor, advantage: Tensor, kl: Tensor, *, beta: float, clip: float = 1e-4
) -> Tensor:
    """ddpo + beta * KL(policy || reference): DPOK (Fan et al. 2023, algorithm 1).

    `kl` is that of the step's two Gaussians, |mean - mean_ref|^2 / (2 sigma^2), and carries a
    gradient; published weight 0.01. (In D3PO's reimplementation it is 0 by mistake.) The authors
    clamp the ratio without PPO's maximum.
    """
    return ddpo(logp, old, advantage, clip=clip) + beta * kl


def reward_weighted(logp: Tensor, advantage: Tensor, *, beta: float) -> Tensor:
    """-exp(A / beta) * logp: reward-weighted regression (Peters & Schaal 2007; Lee et al. 2023).

    Likelihood of the policy's own images, weighted by exp(reward / temperature), as DDPO's paper
    has it for comparison (Black et al. 2023, section 4.1).
    """
    return -torch.exp(advantage / beta) * logp


# ---- the tables ---------------------------------------------------------------------------------

OBJECTIVES: dict[str, Objective] = {
    "dpo": dpo,
    "d3po": dpo,
    "d3po_clipped": d3po_clipped,
    "ipo": ipo,
    "hinge": hinge,
    "robust": robust,
    "conservative": conservative,
    "sppo": sppo,
}
REFERENCE_FREE: dict[str, Objective] = {"simpo": simpo, "orpo": orpo, "mapo": mapo}
UNPAIRED: dict[str, Objective] = {"kto": kto}
POLICY_GRADIENT: dict[str, Objective] = {
    "ddpo": ddpo,
    "dpok": dpok,
    "reward_weighted": reward_weighted,
}


# ---- what to watch ------------------------------------------------------------------------------


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
        "implicit_accuracy": _share_right(h),
        "implicit_margin": beta * h,
        "win_ratio": won,
        "lose_ratio": lost,
        "clipped_share": clipped,
    }


def _h(win: Tensor, lose: Tensor, ref_win: Tensor, ref_lose: Tensor) -> Tensor:
    return (win - ref_win) - (lose - ref_lose)


def free_metrics(win: Tensor, lose: Tensor, beta: float) -> dict[str, Tensor]:
    """The same for objectives without a reference: accuracy and margin of win - lose itself."""
    won, lost = win.detach(), lose.detach()
    return {
        "implicit_accuracy": _share_right(won - lost),
        "implicit_margin": beta * (won - lost),
        "win_logp": won,
        "lose_logp": lost,
    }


def unpaired_metrics(
    logp: Tensor, ref: Tensor, desirable: Tensor, baseline: Tensor, beta: float
) -> dict[str, Tensor]:
    """The same for single images: is a liked one above the baseline, a disliked one below it?"""
    ratio = (logp - ref).detach()
    gain = desirable * (ratio - baseline)
    return {
        "implicit_accuracy": _share_right(gain),
        "implicit_margin": beta * gain,
        "ref_ratio": ratio,
    }


def gradient_metrics(logp: Tensor, old: Tensor, clip: float | None = None) -> dict[str, Tensor]:
    """How far the policy has moved from the one that drew the images; detached, unreduced.

    old_ratio       logp - old
    approx_kl       (logp - old)^2 / 2, in the unit of the log-probabilities
    clipped_share   1 where exp(logp - old) is outside [1 - clip, 1 + clip]; 0 without clip
    """
    moved = (logp - old).detach()
    outside = torch.zeros_like(moved) if clip is None else (moved.exp() - 1).abs() > clip
    return {
        "old_ratio": moved,
        "approx_kl": 0.5 * moved**2,
        "clipped_share": outside.to(moved.dtype),
    }


def _share_right(difference: Tensor) -> Tensor:
    return (difference > 0).to(difference.dtype) + 0.5 * (difference == 0).to(difference.dtype)
