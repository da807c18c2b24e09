"""What is gained by judging pictures while the next ones are drawn (`online.judge_while_sampling`)?

    python benchmarks/judging.py --turns 3 --out FILE

Rounds of the mini model, with a judge that leaves this machine alone: it waits, like one behind a
network, for a share of the time that its pictures took to draw, and then says a number that is a
function of the picture. One way after the other in the same run; scores must be equal. With w the
share, and n parts of equal size, (1 + w) / (max(1, w) + min(1, w) / n) is the most that can be had:
the first part is drawn alone, or the last judged alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d3po.families import load_family
from d3po.generate import SamplerConfig
from d3po.judging import RewardJudge
from d3po.online import OnlineSource
from d3po.online.settings import OnlineConfig
from d3po.policy import Policy, PolicyConfig
from d3po.run import Run, RunConfig
from d3po.trainer import OptimConfig
from fifa.config import write_atomic
from fifa.miniworld import prompts


class Distant:
    """Mean brightness, after a wait of so many seconds a picture."""

    name, differentiable = "distant", False

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """(N,) float32."""
        time.sleep(self.seconds * len(images))
        return images.float().flatten(1).mean(1)


def timed(source: OnlineSource, index: int) -> tuple[float, Any]:
    """Seconds of a round's sampling and judging, and what was found in it."""
    start = time.perf_counter()
    found = source.round(index)
    return time.perf_counter() - start, found.metrics


def main() -> None:
    """A line a share; the table as JSON when asked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25, 1.0, 2.0])
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    family = load_family("mini")
    policy, texts = Policy(family, PolicyConfig()), prompts("train", given.groups, 0)
    sampler = SamplerConfig(steps=given.steps, guidance=1.0, batch=4)  # a part is a group of 4
    table = []
    with tempfile.TemporaryDirectory() as folder:
        run = Run(RunConfig(dir=folder))

        def source(seconds: float, at_once: bool) -> OnlineSource:
            return OnlineSource(
                OnlineConfig(groups=given.groups, images=4, judge_while_sampling=at_once),
                sampler,
                OptimConfig(micro_batch=1),
                family,
                policy,
                RewardJudge([Distant(seconds)]),
                ["distant"],
                texts,
                run,
            )

        timed(source(0.0, False), 0)  # warms up
        for share in given.shares:
            ratios = []
            for turn in range(given.turns):
                drawing, _ = timed(source(0.0, False), turn)
                wait = share * drawing / (4 * given.groups)
                after, one = timed(source(wait, False), turn)
                beside, other = timed(source(wait, True), turn)
                assert one == other, "the two ways differ"
                ratios.append(after / beside)
            best = (1 + share) / (max(1.0, share) + min(1.0, share) / given.groups)
            table.append(
                {
                    "judging_by_drawing": share,
                    "times_as_fast": round(statistics.median(ratios), 2),
                    "at_best": round(best, 2),
                    "turns": [round(ratio, 2) for ratio in ratios],
                }
            )
            print(json.dumps(table[-1]), flush=True)
        run.close()
    if given.out:
        facts = {"groups": given.groups, "steps": given.steps, "table": table}
        write_atomic(given.out, json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
