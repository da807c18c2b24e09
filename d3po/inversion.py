"""Paths of stored pictures: from each picture up to the noise that it might have come from.

A picture from a data set has no denoising path. DDIM inversion makes one: the deterministic sampler
is walked backwards under the reference, x_0 -> x_T (see `sampling.invert`). What is kept of a point
x_t of it is its noise,

    e_t = (x_t - alpha_t x_0) / sigma_t

which takes the place of the fresh noise in `likelihood.renoise_logp`. So the policy is asked how
well it finds the picture from a point of its own path, in one jump: up to a constant the
log-density of N(x_0; x0_hat(x_t), s_t^2), with s_t = sigma_t / alpha_t for predicted noise and
sigma_t for a velocity (InPO, Lu et al. 2025). Each of a pair has its own noise, unlike with fresh
ones.

Why the steps of the path themselves are not scored is said in docs/methods.md.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from d3po.families import Family, guided
from d3po.pair_cache import PairCache
from d3po.policy import Policy
from d3po.run import Run
from d3po.sampling import invert
from d3po.schedule import per_image
from d3po.trainer import reference_logp
from fifa.config import Config, InputError, atomic_path, fingerprint, write_atomic

PART = 256
"""Pairs of a file, about: what a killed process has to compute again."""


class InversionConfig(Config):
    """How a stored picture is walked back to noise."""

    steps: int = Field(
        10, ge=1, description="Steps of the path; those in offline.noise are kept (InPO: 10)."
    )
    guidance: float = Field(
        1.0, ge=0, description="Classifier-free guidance along the path; 1: none (InPO: none)."
    )
    iterations: int = Field(
        1,
        ge=1,
        description="How often the network is asked in a step: 1 as in diffusers' "
        "DDIMInverseScheduler and InPO; more: nearer to the path that leads back to the picture.",
    )


class InvertedPaths:
    """The noise of K points on the paths of all pairs, on disk beside the pairs.

    Made when first asked for, in batches that depend neither on the order of training nor on the
    number of processes, and kept under a key of all that they depend on: the pairs (the folder),
    the reference's weights, the settings, and `numerics`, what its low digits depend on.
    """

    def __init__(
        self,
        config: InversionConfig,
        part: tuple[float, float],
        batch: int,
        family: Family,
        policy: Policy,
        cache: PairCache,
        run: Run,
        numerics: Sequence[Any],
    ) -> None:
        self.config, self.batch, self.run = config, batch, run
        self.family, self.policy, self.cache = family, policy, cache
        self.grid = family.schedule.grid(config.steps, 0.0)
        self.points = points_within(config.steps, part)
        self.dtype = cache.win.dtype
        self.key = fingerprint(
            policy.fingerprint(),
            json.dumps([config.model_dump(), self.points, batch, list(numerics)]),
        )
        # pairs of a part: whole batches, so that a part stands alone
        self.size = batch * max(1, min(PART // batch, -(-len(cache) // batch)))
        self._open: dict[int, NDArray[Any]] = {}

    @property
    def folder(self) -> Path:
        """Where they lie."""
        return self.cache.folder / f"inverted-{self.key}"

    @property
    def times(self) -> Tensor:
        """The model times (K,) of the points."""
        return self.grid.times[self.points]

    @cached_property
    def rows(self) -> list[int]:
        """The pairs whose paths are finite; computed now if they are not there yet.

        Together: every process takes its share. InputError if none is left.
        """
        self.run.everywhere(self._make_own)
        lost = sorted(row for part in self._parts() for row in self._lost(part))
        if lost:
            self.run.say(
                f"{len(lost)} of {len(self.cache)} pairs are left out: the inversion of a picture "
                f"is not finite (their numbers: lost-*.json in {self.folder})"
            )
        kept = sorted(set(range(len(self.cache))) - set(lost))
        if not kept:
            raise InputError(
                "no inverted path is finite: lower offline.inversion.guidance or its iterations, "
                "or use run.mixed_precision bf16 or no"
            )
        return kept

    def noise(self, rows: Sequence[int], points: Sequence[int]) -> Tensor:
        """The noise of pairs at one point each, winners first: (2Q, C, h, w) float32."""
        found = [self._stored(row)[:, point] for row, point in zip(rows, points, strict=True)]
        return torch.from_numpy(np.stack(found, 1).astype(np.float32)).flatten(0, 1)

    def invert(self, rows: Sequence[int]) -> Tensor:
        """The noise of pairs at every point, computed: (Q, 2, K, C, h, w) float32, CPU."""
        pictures = np.concatenate([self.cache.win[rows], self.cache.lose[rows]])
        x_0 = torch.from_numpy(pictures).float().to(self.run.device)
        cond = (
            self.cache.conditioning(self.cache.prompt[rows].tolist()).repeat(2).to(self.run.device)
        )
        empty = self.cache.conditioning([0]).to(self.run.device)
        schedule, scale = self.family.schedule, self.config.guidance

        def walk(denoiser: nn.Module) -> Tensor:
            predict = guided(self.family, denoiser, cond, empty, scale)
            return invert(predict, self.grid, schedule, x_0, self.config.iterations)

        path = reference_logp(self.policy, walk)[:, self.points].transpose(0, 1)  # (K, 2Q, ...)
        alpha, sigma = (per_image(value, path) for value in schedule.alpha_sigma(self.times))
        noise = (path - alpha * x_0) / sigma
        return noise.unflatten(1, (2, len(rows))).permute(2, 1, 0, 3, 4, 5).cpu()

    # ---- files ----------------------------------------------------------------------------------

    def _parts(self) -> range:
        return range(-(-len(self.cache) // self.size))

    def _rows_of(self, part: int) -> range:
        return range(part * self.size, min((part + 1) * self.size, len(self.cache)))

    def _file(self, part: int) -> Path:
        return self.folder / f"part-{part:06d}.bin"

    def _lost(self, part: int) -> list[int]:
        text = (self.folder / f"lost-{part:06d}.json").read_text(encoding="utf-8")
        return list(json.loads(text))

    def _stored(self, row: int) -> NDArray[Any]:
        """(2, K, C, h, w)"""
        part = row // self.size
        if part not in self._open:
            shape = (len(self._rows_of(part)), 2, len(self.points), *self.family.latent_shape)
            self._open[part] = np.memmap(self._file(part), self.dtype, "r", shape=shape)
        found: NDArray[Any] = self._open[part][row - part * self.size]
        return found

    def _make_own(self) -> None:
        """The missing parts of this process's share.

        Every process goes through the network equally often, as weights in pieces want it.
        """
        parts = self._parts()
        missing = [
            parts[i] for i in self.run.share(len(parts)) if not self._file(parts[i]).exists()
        ]
        most = max(self.run.collect([len(missing)]))
        if most:
            self.run.say(
                f"inverting {len(self.cache)} pairs under the reference, {self.config.steps} steps"
                " each, once"
            )
        for part in missing:
            self.run.status(f"inversion, pair {part * self.size} of {len(self.cache)}")
            self._make(part)
        for _ in range(most - len(missing)):
            list(self._batches(range(0)))

    def _make(self, part: int) -> None:
        lost: list[int] = []
        with atomic_path(self._file(part)) as path, path.open("wb") as file:
            for rows, noise in self._batches(self._rows_of(part)):
                finite = np.isfinite(noise).reshape(len(rows), -1).all(1)
                lost += [row for row, good in zip(rows, finite, strict=True) if not good]
                file.write(noise.tobytes())
            # before the part itself, whose being there says that all of it is
            write_atomic(self.folder / f"lost-{part:06d}.json", json.dumps(lost) + "\n")

    def _batches(self, rows: range) -> Iterator[tuple[range, NDArray[Any]]]:
        """Rows and their noise (n, 2, K, C, h, w); as many calls of the network for every part."""
        for start in range(rows.start, rows.start + self.size, self.batch):
            some = range(start, min(start + self.batch, rows.stop))
            noise = self.invert(some or range(1))
            if some:
                yield some, noise.numpy().astype(self.dtype)


def points_within(steps: int, part: tuple[float, float]) -> list[int]:
    """The steps of a path, 0 the noisiest, that begin in a part of the schedule.

    Step i of T begins at 1 - i / T of it, where 0 is clean and 1 pure noise; the part is without
    its lower end, so that two halves share no step. InputError if none is left.
    """
    low, high = part
    found = [i for i in range(steps) if low < 1 - i / steps <= high]
    if not found:
        raise InputError(
            f"offline.noise is {low:g} to {high:g}, where none of the {steps} steps of an inverted "
            "path begins: take more offline.inversion.steps, or a wider part"
        )
    return found
