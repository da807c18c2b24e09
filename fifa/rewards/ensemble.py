"""Several rewards as one: added up by weight, or by rank where their units cannot be compared."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fifa.config import InputError, fingerprint
from fifa.rewards import Reward, score_images

if TYPE_CHECKING:
    import torch

_TERM = re.compile(
    r"(?:([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\*)?([A-Za-z_][\w.]*(?::[^+*]+)?)\+"
)


def parse_sum(spec: str) -> list[tuple[float, str]]:
    """`0.5*mini+oracle` -> [(0.5, "mini"), (1.0, "oracle")]; InputError for anything else.

    A term may carry weights of its own, `0.5*clip:ViT-B-32:openai`, in a path without `+` and `*`.
    """
    text = "".join(spec.split()) + "+"
    terms: list[tuple[float, str]] = []
    while text:
        match = _TERM.match(text)
        if match is None:
            found = text.removesuffix("+")
            raise InputError(f"reward '{spec}': expected terms like 0.5*mini, found '{found}'")
        terms.append((float(match[1] or 1), match[2]))
        text = text[match.end() :]
    return terms


class WeightedSum:
    """sum_m weight_m * reward_m: right when the members share a unit or the weights convert it.

    Weights may be negative and are not normalised: `1*mini+-1*neatness` is a difference.
    """

    def __init__(self, members: Sequence[Reward], weights: Sequence[float]) -> None:
        _check(members, weights)
        self.members = list(members)
        self.weights = list(weights)
        terms = (f"{w:g}*{m.name}" for m, w in zip(members, weights, strict=True))
        self.name = "+".join(terms)
        self.version = _versions(members)
        self.differentiable = all(member.differentiable for member in members)

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """The weighted sum of the members' scores, float32 (N,)."""
        scores = _member_scores(self.members, images, prompts)
        return (scores.new_tensor(self.weights) @ scores).float()

    def to(self, device: str) -> WeightedSum:
        """Move the networks of those members that have one."""
        _move(self.members, device)
        return self


class RankAverage:
    """Weighted mean of the ranks that each member gives, in [0, 1]; immune to units and outliers.

    A rank is the share of fixed reference scores below the image's own, ties counted half, so a
    score does not depend on the batch it came in. `reference` (M, R) holds R scores of each of the
    M members, for instance of images drawn from the base model.
    """

    differentiable = False

    def __init__(
        self, members: Sequence[Reward], weights: Sequence[float], reference: torch.Tensor
    ) -> None:
        _check(members, weights)
        if sum(weights) == 0:
            raise InputError(f"RankAverage divides by the sum of its weights {list(weights)}: 0")
        if reference.ndim != 2 or len(reference) != len(members) or reference.shape[1] == 0:
            raise InputError(
                f"RankAverage needs reference scores ({len(members)}, R), "
                f"got {tuple(reference.shape)}"
            )
        self.members = list(members)
        self.weights = list(weights)
        self._sorted = reference.detach().float().sort(dim=1).values
        terms = (f"{w:g}*{m.name}" for m, w in zip(members, weights, strict=True))
        self.name = f"rank({'+'.join(terms)})"
        scores = self._sorted.cpu().numpy().tobytes()
        self.version = fingerprint(_versions(members), scores)

    @classmethod
    def fitted(
        cls,
        members: Sequence[Reward],
        weights: Sequence[float],
        images: torch.Tensor,
        prompts: Sequence[str],
    ) -> RankAverage:
        """Take the members' scores of these images (R, 3, H, W) as the reference."""
        return cls(members, weights, _member_scores(members, images, prompts))

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """The weighted mean rank, float32 (N,)."""
        import torch

        scores = _member_scores(self.members, images, prompts)
        reference = self._sorted.to(scores.device)
        below = torch.searchsorted(reference, scores)
        not_above = torch.searchsorted(reference, scores, right=True)
        ranks = (below + not_above) / (2 * reference.shape[1])
        weights = ranks.new_tensor(self.weights)
        return (weights @ ranks / weights.sum()).float()

    def to(self, device: str) -> RankAverage:
        """Move the networks of those members that have one."""
        _move(self.members, device)
        return self


def _check(members: Sequence[Reward], weights: Sequence[float]) -> None:
    if not members or len(members) != len(weights) or not any(weights):
        raise InputError(
            f"an ensemble needs rewards and one weight each that are not all 0, "
            f"got {len(members)} rewards and the weights {list(weights)}"
        )


def _versions(members: Sequence[Reward]) -> str:
    """Changes when the weights of any member do."""
    return fingerprint(*(f"{m.name} {getattr(m, 'version', '')}" for m in members))


def _move(members: Sequence[Reward], device: str) -> None:
    for member in members:
        if hasattr(member, "to"):
            member.to(device)


def _member_scores(
    members: Sequence[Reward], images: torch.Tensor, prompts: Sequence[str]
) -> torch.Tensor:
    """Scores of all members, (M, N) on one device."""
    import torch

    scores = [score_images(member, images, prompts) for member in members]
    return torch.stack([score.to(scores[0].device) for score in scores])
