"""The small networks on frozen features: a score, a comparison, a gate.

All read `joint` features, [picture; prompt; picture * prompt], each standardised over the training
rows; a feature that is constant there carries no information and stays 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def joint(picture: Tensor, text: Tensor) -> Tensor:
    """[picture; text; picture * text] of unit vectors (N, D) each, (N, 3 D).

    The products sum to the cosine, so a linear head on these contains the CLIP score.
    """
    return torch.cat([picture, text, picture * text], dim=1)


class Standardise(nn.Module):
    """(x - mean) / std with the numbers of the training rows; 0 where std is 0."""

    mean: Tensor
    scale: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))

    @torch.no_grad()
    def learn(self, rows: Tensor) -> Standardise:
        """Take mean and standard deviation of rows (N, width)."""
        std = rows.double().std(0, correction=0)
        self.mean.copy_(rows.double().mean(0))
        constant = std <= 1e-6 * rows.double().abs().amax(0).clamp(min=1e-12)
        self.scale.copy_(torch.where(constant, 0.0, 1 / std.clamp(min=1e-12)))
        return self

    def forward(self, rows: Tensor) -> Tensor:
        """Standardised rows."""
        return (rows - self.mean) * self.scale


def tower(inputs: int, hidden: int, outputs: int, dropout: float) -> nn.Module:
    """A linear map if `hidden` is 0, else two hidden layers of that width."""
    if not hidden:
        return nn.Linear(inputs, outputs)
    return nn.Sequential(
        nn.Linear(inputs, hidden),
        nn.GELU(),
        nn.Dropout(dropout),
        nn.Linear(hidden, hidden),
        nn.GELU(),
        nn.Dropout(dropout),
        nn.Linear(hidden, outputs),
    )


class ScalarHead(nn.Module):
    """A score of a picture under a prompt; the better of two is the one with the higher score."""

    def __init__(self, width: int, hidden: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.input = Standardise(3 * width)
        self.net = tower(3 * width, hidden, 1, dropout)

    def forward(self, picture: Tensor, text: Tensor) -> Tensor:
        """Scores (N,) of picture and text features (N, width)."""
        return self.net(self.input(joint(picture, text))).squeeze(1)

    def compare(self, first: Tensor, second: Tensor, text: Tensor) -> Tensor:
        """Logit that the first is preferred, (N,)."""
        return self(first, text) - self(second, text)


class PairHead(nn.Module):
    """P(a beats b) = sigma(g(a, b) - g(b, a)): antisymmetric to the last bit, any cycle possible.

    Order averaging (Dong et al. 2024, arXiv 2405.07863, section 2.2) built in.
    """

    def __init__(self, width: int, hidden: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.input = Standardise(3 * width)
        self.net = tower(6 * width, hidden, 1, dropout)

    def compare(self, first: Tensor, second: Tensor, text: Tensor) -> Tensor:
        """Logit that the first is preferred, (N,).

        The two orders go through the network in two calls of equal shape, so that a swap of the
        arguments swaps two numbers and nothing else.
        """
        a, b = self.input(joint(first, text)), self.input(joint(second, text))
        forward, backward = self.net(torch.cat([a, b], 1)), self.net(torch.cat([b, a], 1))
        return (forward - backward).squeeze(1)


class Gate(nn.Module):
    """How much each objective counts for a prompt: softmax weights times one learned scale.

    ArmoRM's (Wang et al. 2024, arXiv 2406.12845, section 3.2), at temperature 1.
    """

    def __init__(
        self, width: int, objectives: int, hidden: int = 128, dropout: float = 0.2
    ) -> None:
        super().__init__()
        self.input = Standardise(width)
        self.net = tower(width, hidden, objectives, dropout)
        self.log_scale = nn.Parameter(torch.zeros(()))

    def forward(self, text: Tensor) -> Tensor:
        """Coefficients (N, objectives) of prompts' features (N, width), none negative."""
        return self.log_scale.exp() * self.net(self.input(text)).softmax(1)


HEADS: dict[str, Any] = {"scalar": ScalarHead, "pairwise": PairHead}
