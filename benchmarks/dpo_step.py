"""What a Diffusion-DPO step costs, against the straight loop.

`python benchmarks/dpo_step.py` (CPU, mini model, minutes)

The straight loop does each step what the published code does: it decodes the pictures of its pairs,
encodes them with the VAE and the prompts with the text encoder, and asks a second UNet for the
reference. It is written here on diffusers and transformers, without the package. Winners and
losers share a forward there too.

Ours is what `train.py` runs: latents and text from the cache, the reference by the adapter off (or
its stored weights); and once more with `offline.noise_draws`, where the reference was asked in an
earlier epoch. What the cache costs once is told as well, in steps of the straight loop.

Both get the same pairs, times and noise, and their gradients are compared. They take turns, a
warm-up first; a ratio is that of one turn, and the median over turns is told. Seconds are those of
the processor, on one thread, so that a neighbour's work hardly counts.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from side_by_side import (
    Keep,
    apart,
    flops,
    gradient_left_by,
    matrix_rate,
    megabytes,
    policy_near_reference,
    seconds_of,
)
from torch import Tensor

from d3po.draws import derive_seed, shuffled
from d3po.losses import BoundObjective, ObjectiveConfig
from d3po.offline import OfflineConfig, OfflineSource
from d3po.pair_cache import cached_pairs
from d3po.policy import Policy
from d3po.run import Run, RunConfig
from d3po.sampling import image_noise
from d3po.trainer import Learner, OptimConfig, train_step
from fifa.config import write_atomic
from fifa.miniworld.dataset import write_dataset
from fifa.pairs import Pair, load_pairs

BETA = 2000.0  # as published
SEED = 0


# ---- the straight loop --------------------------------------------------------------------------


@dataclass(frozen=True)
class Straight:
    """Decode, encode, noise, two UNets."""

    policy: Any
    reference: Any
    vae: Any
    text_encoder: Any
    tokenizer: Any
    scheduler: Any  # diffusers' DDPMScheduler

    def step(self, pairs: Sequence[Pair], noise: Tensor, t: Tensor) -> None:
        """Add the gradient of the mean loss to the policy's `.grad`; noise (B, C, h, w), t (B,)."""
        with torch.no_grad():
            pictures = [pair.win for pair in pairs] + [pair.lose for pair in pairs]
            pixels = torch.stack([pixels_of(picture) for picture in pictures])
            latents = self.vae.encode(pixels).latent_dist.mean * self.vae.config.scaling_factor
            tokens = self.tokenizer(
                [pair.prompt for pair in pairs],
                padding="max_length",
                truncation=True,
                max_length=self.tokenizer.model_max_length,
                return_tensors="pt",
            )
            text = self.text_encoder(tokens.input_ids)[0].repeat(2, 1, 1)
            noise, t = noise.repeat(2, 1, 1, 1), t.repeat(2)
            noisy = self.scheduler.add_noise(latents, noise, t)
            ref_win, ref_lose = errors(self.reference(noisy, t, text).sample, noise)
        win, lose = errors(self.policy(noisy, t, text).sample, noise)
        inside = -0.5 * BETA * ((win - lose) - (ref_win - ref_lose))
        (-torch.nn.functional.logsigmoid(inside).mean()).backward()
        trained = [p for p in self.policy.parameters() if p.requires_grad]
        torch.nn.utils.clip_grad_norm_(trained, float("inf"))  # the norm is computed there too


def pixels_of(data: bytes) -> Tensor:
    """(3, H, W) in [-1, 1] of an encoded picture."""
    from PIL import Image

    array = np.array(Image.open(io.BytesIO(data)).convert("RGB"))
    return torch.from_numpy(array).permute(2, 0, 1).float() / 127.5 - 1


def errors(pred: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Mean squared errors (B,) of winners and losers."""
    win, lose = (pred - noise).square().mean((1, 2, 3)).chunk(2)
    return win, lose


def straight_of(policy: Policy) -> Straight:
    """Every network loaded by diffusers and transformers anew, but for the policy."""
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    name = policy.family.name
    parts = {
        part: kind.from_pretrained(name, subfolder=part).eval().requires_grad_(False)
        for part, kind in (
            ("unet", UNet2DConditionModel),
            ("vae", AutoencoderKL),
            ("text_encoder", CLIPTextModel),
        )
    }
    return Straight(
        policy.bare,
        parts["unet"],
        parts["vae"],
        parts["text_encoder"],
        CLIPTokenizer.from_pretrained(name, subfolder="tokenizer"),
        DDPMScheduler.from_pretrained(name, subfolder="scheduler"),
    )


# ---- the two side by side -----------------------------------------------------------------------


@dataclass(frozen=True)
class Sides:
    """Three ways to make the same step; step n learns from the n-th batch of the shuffled pairs."""

    policy: Policy
    pairs: Sequence[Pair]
    batch: int
    straight: Straight
    fresh: OfflineSource
    once: OfflineSource  # the reference's scores were cached in an earlier epoch
    learner: Learner
    keep: Keep
    run: Run

    def straight_step(self, step: int) -> None:
        """The straight loop's, on the times and noises that ours will draw."""
        rows = shuffled(SEED, len(self.pairs), step * self.batch, (step + 1) * self.batch)
        shape = self.policy.family.latent_shape
        noise = image_noise([derive_seed(SEED, "noise", 0, row) for row in rows], shape, 0)
        t = torch.tensor([derive_seed(SEED, "time", 0, row) % 1000 for row in rows])
        self.straight.step([self.pairs[row] for row in rows], noise, t)

    def own_step(self, source: OfflineSource, step: int) -> None:
        """The package's."""
        train_step(self.learner, next(source.round(step).updates), self.run, step)

    def turn(self, step: int) -> tuple[float, float, float, float]:
        """Seconds of the straight step, of ours, of ours with cached reference; difference."""
        seconds = []

        def straight() -> None:
            seconds.append(seconds_of(lambda: self.straight_step(step)))

        expected = gradient_left_by(straight, self.policy)
        for source in (self.fresh, self.once):
            source.round(step)  # whoever is first scores the reference of the whole epoch
            seconds.append(seconds_of(lambda s=source: self.own_step(s, step)))  # type: ignore[misc]
        return seconds[0], seconds[1], seconds[2], apart(self.keep.kept, expected)


def sides_of(method: str, batch: int, data: str, folder: str) -> tuple[Sides, float]:
    """Everything loaded, and the seconds that encoding the pairs took."""
    policy = policy_near_reference(method)
    run = Run(RunConfig(dir=f"{folder}/run-{method}-{batch}", seed=SEED))
    config = OfflineConfig(data=data, cache=f"{folder}/cache-{method}-{batch}")
    optim = OptimConfig(micro_batch=batch, max_grad_norm=None)
    encoding = seconds_of(lambda: cached_pairs(config, policy.family, run))
    cache = cached_pairs(config, policy.family, run)
    fresh, once = (
        OfflineSource(
            config.model_copy(update={"noise_draws": draws}),
            optim,
            policy.family,
            policy,
            cache,
            run,
        )
        for draws in (None, 1)
    )
    keep = Keep(policy.trainable(), lr=1.0)
    policy.denoiser, wrapped = run.accelerator.prepare(policy.bare, keep)
    objective = BoundObjective.from_config(ObjectiveConfig(name="dpo", beta=BETA))
    learner = Learner(policy, wrapped, objective, optim)
    pairs, _ = load_pairs(data)
    straight = straight_of(policy)
    return Sides(policy, pairs, batch, straight, fresh, once, learner, keep, run), encoding


def compare(method: str, batch: int, data: str, folder: str, turns: int) -> dict[str, Any]:
    """One row of the table."""
    sides, encoding = sides_of(method, batch, data, folder)
    steps = len(sides.pairs) // batch  # of one epoch; the first turn warms up
    found = [sides.turn(turn % steps) for turn in range(turns + 1)][1:]
    straight_flops = flops(lambda: sides.straight_step(0))
    own_flops = flops(lambda: sides.own_step(sides.fresh, 0))
    cached_flops = flops(lambda: sides.own_step(sides.once, 0))
    sides.run.close()
    straight, own, cached = (statistics.median(turn[i] for turn in found) for i in range(3))
    ratios = sorted(turn[0] / turn[1] for turn in found)
    stored = sum(value.nbytes for value in sides.policy._stored.values())
    return {
        "method": method,
        "pairs_a_step": batch,
        "straight_seconds": round(straight, 3),
        "seconds": round(own, 3),
        "seconds_cached_reference": round(cached, 3),
        "ratio": round(statistics.median(ratios), 2),
        "ratio_lowest": round(ratios[0], 2),
        "ratio_highest": round(ratios[-1], 2),
        "ratio_cached_reference": round(statistics.median(t[0] / t[2] for t in found), 2),
        "flop_ratio": round(straight_flops / own_flops, 2),
        "flop_ratio_cached_reference": round(straight_flops / cached_flops, 2),
        "straight_gflops_per_second": round(straight_flops / straight / 1e9, 1),
        "gflops_per_second": round(own_flops / own / 1e9, 1),
        "encoding_in_straight_steps": round(encoding / len(sides.pairs) * batch / straight, 2),
        "largest_gradient_difference": max(turn[3] for turn in found),
        "second_unet_mb": megabytes(sides.straight.reference),
        "own_reference_mb": round(stored / 1e6, 1),
        "encoders_mb": megabytes(sides.straight.vae) + megabytes(sides.straight.text_encoder),
    }


def main() -> None:
    """Print one line a row; write the table when asked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--methods", nargs="+", default=["lora", "full"])
    parser.add_argument("--pairs", type=int, nargs="+", default=[8, 32], help="pairs a step")
    parser.add_argument("--rows", type=int, default=160, help="of the data set that is made")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        data = f"{folder}/pairs"
        write_dataset(data, arguments.rows, seed=SEED)
        for method in arguments.methods:
            for pairs in arguments.pairs:
                rows.append(compare(method, pairs, data, folder, arguments.turns))
                print(json.dumps(rows[-1]), flush=True)
    facts = {
        "what": "one Diffusion-DPO step, mini model, float32, one thread, gradient only",
        "turns": arguments.turns,
        "torch": torch.__version__,
        "matrix_gflops_per_second": round(matrix_rate(), 1),
        "rows": rows,
    }
    if arguments.out:
        write_atomic(arguments.out, json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
