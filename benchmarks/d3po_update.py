"""What a D3PO update costs, against the published procedure written straight.

`python benchmarks/d3po_update.py` (CPU, mini model, minutes)

The straight way goes pair by pair and step by step, as the authors' code does at its batch size of
1: the winner and the loser each through the policy and through a second UNet that is the reference,
each with its unconditional twin beside it, four calls in all; then back through the two of the
policy. It is written here from the formulas, on diffusers' UNet, without the package.

Ours is what `train.py` runs: each image scored once a step for all its pairs, the reference by the
adapter off (or its stored weights), once a rollout.

Both get the same rollout, and their gradients are compared, so it is one update done in two ways.
Of the straight way three pairs are timed and counted up to all: each costs it the same.
They take turns, a warm-up first; a ratio is that of one turn, and the median over turns is told.
Seconds are those of the processor, on one thread, so that a neighbour's work hardly counts.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

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

from d3po.draws import derive_seed
from d3po.families import Family, load_family
from d3po.generate import Generated, Order, SamplerConfig, generate
from d3po.judging import Place, Scores, strict_pairs
from d3po.losses import BoundObjective, ObjectiveConfig
from d3po.online import OnlineSource
from d3po.online.settings import OnlineConfig
from d3po.policy import Policy
from d3po.run import Run, RunConfig
from d3po.trainer import Learner, OptimConfig, train_step
from d3po.updates import Chunk
from fifa.config import write_atomic

GUIDANCE, BETA, CLIP = 5.0, 0.1, 0.1  # as published
PROMPT = "a red circle above a blue square"


def brightness(images: Tensor, prompts: Sequence[str], places: Sequence[Place]) -> Scores:
    """An order without ties, so that every pair of a group is one to learn from."""
    return images.double().mean((1, 2, 3)).cpu().numpy()[:, None]


# ---- the straight way ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Walk:
    """One image's way through the sampler, as the authors' code stores it."""

    latents: Tensor  # (T+1, C, h, w)
    text: Tensor  # (1, L, D)

    def double(self) -> Walk:
        """The same in float64."""
        return Walk(self.latents.double(), self.text.double())


Pair = tuple[Walk, Walk]  # the winner's and the loser's
Turn = tuple[float, dict[tuple[int, int], float]]
"""Seconds of the straight way, and ours by (steps at once, inner epochs)."""


@dataclass(frozen=True)
class Straight:
    """Pair by pair: policy and reference UNet, the prompt and the empty prompt, DDIM at eta 1."""

    policy: Any
    reference: Any
    uncond: Tensor  # (1, L, D)
    abar: Tensor  # (1000,) float64, of the DDIM scheduler
    final: float  # signal that the last step arrives at
    times: Sequence[int]

    def logp(self, unet: Any, path: Walk, i: int) -> Tensor:
        """Mean log-density per element of the stored step i of one image."""
        x_t, x_s, t = path.latents[i][None], path.latents[i + 1][None], self.times[i]
        previous = t - len(self.abar) // len(self.times)
        a_t = float(self.abar[t])
        a_s = float(self.abar[previous]) if previous >= 0 else self.final
        variance = (1 - a_s) / (1 - a_t) * (1 - a_t / a_s)
        text = torch.cat([self.uncond, path.text])
        both = unet(torch.cat([x_t, x_t]), torch.tensor([t, t]), text).sample
        without, with_text = both.chunk(2)
        eps = without + GUIDANCE * (with_text - without)
        x0 = (x_t - (1 - a_t) ** 0.5 * eps) / a_t**0.5
        mean = a_s**0.5 * x0 + (1 - a_s - variance) ** 0.5 * eps
        constant = 0.5 * torch.tensor(2 * torch.pi * variance).log()
        return (-((x_s - mean) ** 2) / (2 * variance) - constant).mean()

    def update(self, pairs: Sequence[Pair]) -> None:
        """Add the gradient of the mean loss over pairs and steps to the policy's `.grad`."""
        terms = len(pairs) * len(self.times)
        for win, lose in pairs:
            for i in range(len(self.times)):
                with torch.no_grad():
                    ref_win = self.logp(self.reference, win, i)
                    ref_lose = self.logp(self.reference, lose, i)
                ratio_win = (self.logp(self.policy, win, i) - ref_win).exp()
                ratio_lose = (self.logp(self.policy, lose, i) - ref_lose).exp()
                won = ratio_win.clamp(1 - CLIP, 1 + CLIP).log()
                lost = ratio_lose.clamp(1 - CLIP, 1 + CLIP).log()
                loss = -torch.nn.functional.logsigmoid(BETA * (won - lost))
                (loss / terms).backward()


# ---- ours ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ours:
    """Rounds of one group of G images, learned from without moving the weights."""

    source: OnlineSource
    learner: Learner
    keep: Keep
    run: Run

    def update(self) -> float:
        """Seconds from the judged rollout to the gradient, which `keep` then holds."""
        updates = self.source.round(0).updates
        return seconds_of(
            lambda: [train_step(self.learner, update, self.run, 0) for update in updates]
        )


def ours_of(policy: Policy, run: Run, sampler: SamplerConfig, online: OnlineConfig) -> Ours:
    """The package's own source and learner."""
    config = OptimConfig(max_grad_norm=None)
    objective = ObjectiveConfig(name="d3po_clipped", beta=BETA, options={"clip": CLIP})
    keep = Keep(policy.trainable(), lr=1.0)
    policy.denoiser, wrapped = run.accelerator.prepare(policy.bare, keep)
    learner = Learner(policy, wrapped, BoundObjective.from_config(objective), config)
    names = ["brightness"]
    source = OnlineSource(
        online, sampler, config, policy.family, policy, brightness, names, [PROMPT], run
    )
    return Ours(source, learner, keep, run)


# ---- the two side by side -----------------------------------------------------------------------


def same_rollout(family: Family, policy: Policy, sampler: SamplerConfig, images: int) -> Generated:
    """The group that round 0 of the source samples, drawn once more from the same seeds."""
    start = derive_seed(0, "start", 0, 0)
    orders = [Order(PROMPT, start, derive_seed(0, "path", 0, 0, k)) for k in range(images)]
    (made,) = generate(family, policy.bare, sampler, orders)
    return made


def straight_of(
    policy: Policy, reference: Any, sampler: SamplerConfig, images: int
) -> tuple[Straight, list[Pair]]:
    """(the straight way, its pairs) on the same rollout."""
    from diffusers import DDIMScheduler

    family = policy.family
    made = same_rollout(family, policy, sampler, images)
    scheduler = DDIMScheduler.from_pretrained(family.name, subfolder="scheduler")
    scheduler.set_timesteps(sampler.steps)
    straight = Straight(
        policy.bare,
        reference,
        family.encode_text([""]).tensors["text"],
        scheduler.alphas_cumprod.double(),
        float(scheduler.final_alpha_cumprod),
        scheduler.timesteps.tolist(),
    )
    text = made.cond.tensors["text"]
    paths = [Walk(made.trajectory.latents[k], text[k : k + 1]) for k in range(images)]
    order = strict_pairs(brightness(made.images, [], []))
    return straight, [(paths[win], paths[lose]) for win, lose in order]


def difference(
    policy: Policy, reference: Any, run: Run, images: int, arguments: argparse.Namespace
) -> float:
    """|g - g'| / |g'| of the two gradients, both computed in float64; the networks stay in it.

    On all pairs, with a path of at most `check_steps` steps.
    """
    sampler = SamplerConfig(steps=min(arguments.steps, arguments.check_steps), guidance=GUIDANCE)
    policy.bare.double()
    straight, pairs = straight_of(policy, reference.double(), sampler, images)
    wide = dataclasses.replace(straight, uncond=straight.uncond.double())
    doubled = [(win.double(), lose.double()) for win, lose in pairs]
    theirs = gradient_left_by(lambda: wide.update(doubled), policy)
    ours = ours_of(policy, run, sampler, OnlineConfig(groups=1, images=images))
    for update in ours.source.round(0).updates:
        chunks = [in_float64(chunk) for chunk in update.chunks]
        train_step(ours.learner, dataclasses.replace(update, chunks=chunks), ours.run, 0)
    return apart(ours.keep.kept, theirs)


def in_float64(chunk: Chunk) -> Chunk:
    """The same chunk on float64 latents and text; its reference is scored anew."""
    assert isinstance(chunk.logp, partial)
    latents, cond, steps = chunk.logp.args
    logp = partial(chunk.logp.func, latents.double(), cond.to(torch.float64), steps)
    return dataclasses.replace(chunk, logp=logp, ref=None)


def compare(method: str, images: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row of the table for each number of steps at once."""
    sampler = SamplerConfig(steps=arguments.steps, guidance=GUIDANCE)
    reference, policy = load_family("mini").denoiser, policy_near_reference(method)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(RunConfig(dir=folder))
        ours = {
            (at_once, epochs): ours_of(
                policy,
                run,
                sampler,
                OnlineConfig(groups=1, images=images, steps_at_once=at_once, inner_epochs=epochs),
            )
            for at_once in arguments.steps_at_once
            for epochs in (1, 2)
        }
        straight, pairs = straight_of(policy, reference, sampler, images)
        some = pairs[: arguments.timed_pairs]  # every pair costs the straight way the same
        turns = []
        for _ in range(arguments.turns + 1):
            seconds = seconds_of(lambda: straight.update(some)) * len(pairs) / len(some)
            policy.bare.zero_grad(set_to_none=True)
            turns.append((seconds, {key: own.update() for key, own in ours.items()}))
        straight_flops = len(pairs) * flops(lambda: straight.update(pairs[:1]))
        policy.bare.zero_grad(set_to_none=True)
        first = ours[arguments.steps_at_once[0], 1]
        own_flops = flops(first.update) - flops(lambda: first.source.round(0))
        facts = {
            "method": method,
            "images": images,
            "pairs": len(pairs),
            "flop_ratio": round(straight_flops / own_flops, 2),
            "second_unet_mb": megabytes(reference),
            "gradient_difference_float64": difference(policy, reference, run, images, arguments),
        }
        run.close()
    return [
        {**facts, "steps_at_once": n, **times(turns[1:], n, straight_flops, own_flops)}
        for n in arguments.steps_at_once
    ]


def times(turns: Sequence[Turn], at_once: int, straight_flops: int, own_flops: int) -> Any:
    """Medians over the turns of the seconds and of each turn's ratio."""
    straight = statistics.median(seconds for seconds, _ in turns)
    own = statistics.median(found[at_once, 1] for _, found in turns)
    ratios = sorted(seconds / found[at_once, 1] for seconds, found in turns)
    twice = statistics.median(2 * seconds / found[at_once, 2] for seconds, found in turns)
    return {
        "straight_seconds": round(straight, 3),
        "seconds": round(own, 3),
        "ratio": round(statistics.median(ratios), 2),
        "ratio_lowest": round(ratios[0], 2),
        "ratio_highest": round(ratios[-1], 2),
        "ratio_two_epochs": round(twice, 2),
        "straight_gflops_per_second": round(straight_flops / straight / 1e9, 1),
        "gflops_per_second": round(own_flops / own / 1e9, 1),
    }


def main() -> None:
    """Print one line a row; write the table when asked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, nargs="+", default=[7, 2])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--steps-at-once", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--methods", nargs="+", default=["lora", "full"])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--timed-pairs", type=int, default=3, help="of the straight way, a turn")
    parser.add_argument("--check-steps", type=int, default=4, help="of the gradients' comparison")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # what two threads gain is lost again on a machine with other work
    facts: dict[str, Any] = {
        "what": "one D3PO update of one group, mini model, guidance 5, float32, one thread",
        "steps": arguments.steps,
        "turns": arguments.turns,
        "torch": torch.__version__,
        "matrix_gflops_per_second": round(matrix_rate(), 1),
        "rows": [],
    }
    for method in arguments.methods:
        for images in arguments.images:
            found = compare(method, images, arguments)
            print(*map(json.dumps, found), sep="\n", flush=True)
            facts["rows"] += found
            if arguments.out:  # what is there is kept when the rest is given up
                write_atomic(arguments.out, json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
