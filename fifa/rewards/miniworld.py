"""Rewards that know the mini world's truth: the oracle's verdict, and neatness.

They score what they see in the pixels, prompt by prompt, without a network. Images must be 32 x 32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fifa.config import InputError
from fifa.images import to_uint8
from fifa.miniworld.captions import parse
from fifa.miniworld.oracle import Verdict, judge, look, neatness
from fifa.miniworld.vocabulary import IMAGE_SIZE

if TYPE_CHECKING:
    import torch


class OracleReward:
    """Share of the prompt's conditions that hold in the image, in [0, 1].

    The share, and not whether all hold, because a step from one to two conditions out of five
    should count. A prompt that asks for nothing of the mini world raises UnparsedPrompt.
    """

    name = "oracle"
    needs = "pictures of 32 x 32"
    differentiable = False

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Shares, float32 (N,)."""
        return _scores([verdict.share for verdict in _verdicts(images, prompts, self.name)], images)


class StrictOracleReward:
    """1 where every condition of the prompt holds in the image, 0 otherwise.

    A prompt that asks for nothing of the mini world raises UnparsedPrompt.
    """

    name = "oracle_strict"
    needs = "pictures of 32 x 32"
    differentiable = False

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """0 or 1, float32 (N,)."""
        verdicts = _verdicts(images, prompts, self.name)
        return _scores([float(verdict.all_hold) for verdict in verdicts], images)


class NeatnessReward:
    """How clean an image is, in (0, 1] (see `fifa.miniworld.oracle.neatness`); ignores prompts."""

    name = "neatness"
    needs = "pictures of 32 x 32"
    differentiable = False

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Neatness, float32 (N,)."""
        _check_size(images, self.name)
        return _scores([neatness(image) for image in to_uint8(images)], images)


def _verdicts(images: torch.Tensor, prompts: Sequence[str], name: str) -> list[Verdict]:
    _check_size(images, name)
    if len(images) != len(prompts):
        raise InputError(f"reward '{name}' got {len(images)} images but {len(prompts)} prompts")
    requests = [parse(prompt) for prompt in prompts]
    pixels = to_uint8(images)
    return [judge(look(image), request) for image, request in zip(pixels, requests, strict=True)]


def _check_size(images: torch.Tensor, name: str) -> None:
    if tuple(images.shape[1:]) != (3, IMAGE_SIZE, IMAGE_SIZE):
        raise InputError(
            f"reward '{name}' reads images (N, 3, {IMAGE_SIZE}, {IMAGE_SIZE}), "
            f"got {tuple(images.shape)}"
        )


def _scores(values: list[float], images: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.tensor(values, dtype=torch.float32, device=images.device)
