"""How likely is what a person said, given how much better one picture is: pure functions.

`delta` (N,) is the score of the first picture minus that of the second, in logits; `label` (N,) is
1 where the first won, 0 where the second did, 0.5 for a tie. All return the negative log-likelihood
(N,) in nats. With label smoothing s a person presses a random button with probability s.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Likelihood = Callable[..., "Tensor"]


def bradley_terry(
    delta: Tensor, label: Tensor, tie: Tensor | None = None, *, smoothing: float = 0.0
) -> Tensor:
    """P(first wins) = sigma(delta) (Bradley and Terry 1952); a tie is half a win for each.

    `tie` is ignored: this model has no probability of a tie.
    """
    from torch.nn import functional as F

    target = label * (1 - smoothing) + smoothing / 2
    return F.binary_cross_entropy_with_logits(delta, target, reduction="none")


def rao_kupper(delta: Tensor, label: Tensor, tie: Tensor, *, smoothing: float = 0.0) -> Tensor:
    """A tie is a difference too small to be seen (Rao and Kupper 1967).

    P(first wins) = sigma(delta - eta), P(second wins) = sigma(-delta - eta), the rest are ties.
    eta = softplus(tie) > 0 is the half-width of what cannot be told apart, theta = exp(eta) in the
    paper. The probability of a tie is written as a product, exact where the difference of two
    sigmoids is not: sigma(delta + eta) sigma(eta - delta) (1 - exp(-2 eta)).
    """
    import torch
    from torch.nn import functional as F

    eta = F.softplus(tie)
    first, second = F.logsigmoid(delta - eta), F.logsigmoid(-delta - eta)
    both = F.logsigmoid(delta + eta) + F.logsigmoid(eta - delta)
    return _chosen(first, second, both + torch.log(-torch.expm1(-2 * eta)), label, smoothing)


def davidson(delta: Tensor, label: Tensor, tie: Tensor, *, smoothing: float = 0.0) -> Tensor:
    """A tie is a third answer, likeliest between equals (Davidson 1970).

    With scores s and s', P(first), P(second) and P(tie) are as exp(s), exp(s') and
    nu exp((s + s') / 2); nu = exp(tie).
    """
    import torch

    logits = torch.stack([delta / 2, -delta / 2, tie.expand_as(delta)])
    first, second, both = logits.log_softmax(0)
    return _chosen(first, second, both, label, smoothing)


LIKELIHOODS: dict[str, Likelihood] = {
    "half": bradley_terry,
    "drop": bradley_terry,  # there are no ties left
    "rao_kupper": rao_kupper,
    "davidson": davidson,
}


def _chosen(first: Tensor, second: Tensor, both: Tensor, label: Tensor, smoothing: float) -> Tensor:
    """Minus the log-probability of the label, mixed with that of a random one of the three."""
    import torch

    said = torch.where(label == 0.5, both, torch.where(label > 0.5, first, second))
    return -(1 - smoothing) * said - smoothing * (first + second + both) / 3
