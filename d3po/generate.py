"""Prompts and seeds in, paths and pictures out: the one place where a denoiser draws.

Rollouts, evaluations and `d3po sample` all come through here, so they sample alike. A picture
depends on its prompt, its two seeds and the weights, never on what else is in the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor, nn

from d3po.draws import derive_seed
from d3po.families import Family, guided
from d3po.families.conditioning import Conditioning
from d3po.sampling import Reduce, Trajectory, image_noise, path_noise, rollout
from d3po.schedule import TimeGrid
from d3po.speed import encoders_at_hand
from fifa.config import Config


class SamplerConfig(Config):
    """How pictures are drawn, in training rollouts and in evaluation alike."""

    steps: int = Field(20, ge=1, description="Denoising steps T of a picture (D3PO, table 2: 20).")
    eta: float = Field(
        1.0,
        ge=0,
        le=1,
        description="Noise of each step: 0 deterministic, 1 as much as DDPM (D3PO, table 2: 1); of "
        "a flow model, the level a of its SDE (Flow-GRPO: 0.7).",
    )
    guidance: float = Field(
        5.0,
        ge=0,
        description="Classifier-free guidance scale; 1 is none, and half the work (D3PO, table "
        "2: 5).",
    )
    batch: int = Field(
        64,
        ge=1,
        description="Pictures a process draws at once; changes the speed, not the pictures.",
    )

    def grid(self, family: Family) -> TimeGrid:
        """The T steps of this sampler on the family's noise schedule."""
        return family.schedule.grid(self.steps, self.eta)


@dataclass(frozen=True)
class Order:
    """One picture to make: its prompt, the seed of its start noise, the seed of its path noise."""

    prompt: str
    start: int
    path: int


def independent_orders(
    prompts: Sequence[str], images: int, seed: int, rows: Sequence[int]
) -> list[Order]:
    """`images` pictures of each of prompts[rows], each from its own start and path noise.

    The noise depends on (seed, row, picture) alone, so two networks asked for the same orders can
    be compared picture by picture.
    """
    return [
        Order(
            prompts[row],
            derive_seed(seed, "independent start", row, k),
            derive_seed(seed, "independent path", row, k),
        )
        for row in rows
        for k in range(images)
    ]


@dataclass(frozen=True, eq=False)
class Generated:
    """A batch of pictures in the order asked for, with all that training needs of them."""

    cond: Conditioning  # B rows
    trajectory: Trajectory  # latents (B, T+1, C, h, w)
    images: Tensor  # (B, 3, H, W) float32 in [0, 1]


@torch.no_grad()
def generate(
    family: Family,
    denoiser: nn.Module,
    sampler: SamplerConfig,
    orders: Sequence[Order],
    reduce: Reduce = "mean",
) -> Iterator[Generated]:
    """Make the pictures, `sampler.batch` at a time."""
    with encoders_at_hand(family):
        yield from _generated(family, denoiser, sampler, orders, reduce)


def _generated(
    family: Family,
    denoiser: nn.Module,
    sampler: SamplerConfig,
    orders: Sequence[Order],
    reduce: Reduce,
) -> Iterator[Generated]:
    grid = sampler.grid(family)
    uncond = family.encode_text([""]) if sampler.guidance != 1 else None
    for start in range(0, len(orders), sampler.batch):
        part = orders[start : start + sampler.batch]
        cond = encode_prompts(family, [order.prompt for order in part])
        paths = [order.path for order in part]
        x_T = image_noise([order.start for order in part], family.latent_shape, -1)
        trajectory = rollout(
            guided(family, denoiser, cond, uncond, sampler.guidance),
            grid,
            family.schedule,
            x_T.to(family.device),
            path_noise(paths, family.latent_shape),
            reduce,
        )
        yield Generated(cond, trajectory, family.decode(trajectory.x0))


@torch.no_grad()
def encode_prompts(family: Family, prompts: Sequence[str]) -> Conditioning:
    """Conditioning of N rows; a prompt that repeats is encoded once."""
    distinct = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    encoded = family.encode_text(list(distinct))
    return encoded[[distinct[prompt] for prompt in prompts]]
