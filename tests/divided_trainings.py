"""Trainings of two processes that divide something, for the tests of each way to divide it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pair_files import write_pairs
from safetensors.torch import load_file
from torch import Tensor
from train_runs import TRAIN, environment, free_port, launcher, train_and_kill

from d3po import recipe
from d3po.run_folder import RunFolder

Settings = Callable[..., list[str]]  # overrides of a training in a folder, further ones last

WEIGHTS = {
    "lora": "weights/pytorch_lora_weights.safetensors",
    "full": "weights/unet/diffusion_pytorch_model.safetensors",
}
KILLED = "pairs of rollouts, full"
PARTS = ("policy", "optimizer")

# Whoever has a tie has nothing to learn from in that update: in round 0 the second process, in
# round 1 both, in round 2 the first; in round 3 nobody has one. Four groups a round.
TIES = {(0, 1), (1, 0), (1, 1), (2, 0)}

TRAININGS: dict[str, dict[str, list[str]]] = {
    "pairs of rollouts, full": {
        "learn": ["objective={name: dpo, beta: 20}", "optim={max_steps: 8, learning_rate: 1e-4}"],
        "from": ["online.groups=4", "online.images=2", "online.labels={labels}"],
        "how": ["policy={method: full, ema_decay: 0.5}", "optim.gradient_checkpointing=true"],
        "watch": ["eval={prompts: '{eval}', every: 4, images: 1, judges: [jpeg_compressibility]}"],
    },
    "rewards with a KL, LoRA": {
        "learn": ["objective={name: dpok, beta: 20}", "optim={max_steps: 4, learning_rate: 1e-2}"],
        "from": ["online.groups=2", "online.images=3", "online.labels={labels}"],
        "how": ["online.inner_epochs=2"],
        "watch": ["eval.prompts=null"],
    },
    "stored pairs, full": {
        "learn": ["objective={name: dpo, beta: 2000}", "optim={max_steps: 4, learning_rate: 1e-4}"],
        "from": ["method=dpo", "offline.data={pairs}", "offline.cache={cache}"],
        "how": ["policy.method=full", "offline.noise_draws=2", "offline.encode_batch=3"],
        "watch": ["offline.held_out_fraction=0.4"],
    },
    "stored labels, LoRA": {
        "learn": ["objective={name: kto, beta: 2000}", "optim={max_steps: 4, learning_rate: 1e-2}"],
        "from": ["method=dpo", "offline.data={pairs}", "offline.cache={cache}"],
        "how": ["policy.ema_decay=0.5", "optim.fused=true"],
        "watch": ["eval.prompts=null"],
    },
}


def store(folder: Path) -> None:
    """Prompts, scores and pairs, for `settings`."""
    (folder / "train.txt").write_text("a red circle\na blue square\ntwo stars\na purple star\n")
    (folder / "eval.txt").write_text("a heart\nthree circles\na cross\n")  # two and one
    scores = [
        {
            "round": r,
            "group": g,
            "scores": [0, 0, 0] if (r, g % 2) in TIES else [(r + g) % 2, (r + g + 1) % 2, 2],
        }
        for r in range(4)
        for g in range(4)
    ]
    for images in (2, 3):
        lines = [json.dumps({**row, "scores": row["scores"][:images]}) for row in scores]
        (folder / f"labels-{images}.jsonl").write_text("\n".join(lines))
    write_pairs(folder / "pairs.parquet", 14)


def settings_of(model: Path, stored: Path) -> Settings:
    """How a training of TRAININGS is told to begin with a model, and with what `store` wrote."""

    def overrides(name: str, folder: Path, *more: str) -> list[str]:
        images = 2 if "pairs" in name else 3
        places = {
            "labels": stored / f"labels-{images}.jsonl",
            "eval": stored / "eval.txt",
            "pairs": stored / "pairs.parquet",
            "cache": folder.parent / "cache",
        }
        own = [text for part in TRAININGS[name].values() for text in part]
        for key, path in places.items():
            own = [text.replace(f"{{{key}}}", str(path)) for text in own]
        if "method=dpo" not in own:
            own += [f"online.prompts={stored / 'train.txt'}", "sampler={steps: 2, guidance: 1.0}"]
        return [
            f"model={model}",
            *own,
            "optim.epsilon=1e-2",  # as it is, a gradient that is nothing but rounding moves weights
            f"run={{dir: '{folder}', checkpoint_every: 2}}",
            *more,
        ]

    return overrides


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def moved(start: dict[str, Tensor], end: dict[str, Tensor]) -> float:
    """The largest difference of a weight, over the names in `start`."""
    return max(float((end[key] - start[key]).abs().max()) for key in start)


def both(
    settings: Settings, model: Path, folder: Path, file: str, worker: str, first: int, **plan: Any
) -> Path:
    """The folder of what two processes did: a training each in a folder of its name, and "killed".

    That one was begun by the command that people type, killed at a line of metrics from `first` on,
    and taken up again with the others. `file` is of configs/accelerate, `worker` reads the plan.
    """
    killed = settings(KILLED, folder / "killed")
    train_and_kill(killed, folder / "killed", first, 11, launcher(file))
    assert not (folder / "killed" / "weights").exists()
    plan |= {
        "model": str(model),
        "folder": str(folder),
        "trainings": [*(settings(name, folder / name) for name in TRAININGS), killed],
        "ports": [free_port() for _ in range(3 + len(TRAININGS))],
    }
    (folder / "plan.json").write_text(json.dumps(plan))
    path = os.pathsep.join([str(Path(TRAIN).parent), os.environ.get("PYTHONPATH", "")])
    ended = subprocess.run(
        [sys.executable, *launcher(file), worker, str(folder / "plan.json")],
        capture_output=True,
        text=True,
        env=environment(CUDA_VISIBLE_DEVICES="", PYTHONPATH=path),
        check=False,
        timeout=600,  # processes that wait for each other wait for ever
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return folder


@pytest.fixture(scope="module")
def settings(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Overrides of a training of TRAININGS on the tiny model."""
    stored = tmp_path_factory.mktemp("stored")
    store(stored)
    return settings_of(tiny_sd, stored)


class Trainings:
    """What `both` left in the fixture `two`, against what one process makes of the same."""

    @pytest.mark.parametrize("name", TRAININGS)
    def test_two_processes_learn_what_one_learns(
        self, settings: Settings, two: Path, tmp_path: Path, name: str
    ) -> None:
        """Within 1e-3 of the way that the weights went.

        What is said of a step is exact to 1e-3, or to the rounding of a log-probability (5e-7)
        times beta, which is what margins are differences of.
        """
        one = tmp_path / "one"
        recipe.train(recipe.load(None, settings(name, one, "optim.micro_batch=2")))
        config = recipe.load(one / "config.yaml")
        file = WEIGHTS[config.policy.method]
        ours, theirs = load_file(one / file), load_file(two / name / file)
        if config.policy.method == "full":
            start = load_file(Path(config.model) / "unet/diffusion_pytorch_model.safetensors")
        else:
            start = {key: torch.zeros_like(value) for key, value in ours.items() if "lora_B" in key}
        way = moved(start, ours)
        assert way > 10 * config.optim.learning_rate * config.optim.epsilon
        assert moved(ours, theirs) < 1e-3 * way + 1e-7
        rounding = max(1e-5, 5e-7 * (config.objective.beta or 1))
        for mine, other in zip(rows_of(one), rows_of(two / name), strict=True):
            assert (mine["kind"], mine["step"]) == (other["kind"], other["step"])
            for key in {"loss", "grad_norm", "kl", "pairs", "images", "margin"} & mine.keys():
                assert mine[key] == pytest.approx(other[key], rel=1e-3, abs=rounding), (key, mine)

    def test_ties_and_odd_shares_were_met(self, two: Path) -> None:
        """The runs above had processes without work, or they would prove little."""
        rows = rows_of(two / KILLED)
        assert [r["pairs"] for r in rows if r["kind"] == "update"] == [1, 1, 0, 0, 1, 1, 2, 2]
        assert [r["step"] for r in rows if r["kind"] == "eval"] == [0, 4, 8]
        rows = rows_of(two / "stored pairs, full")
        held_out = [r["pairs"] for r in rows if r["kind"] == "held_out"]
        assert held_out
        assert held_out[0] % 2 == 1
        kl = [r["kl"] for r in rows_of(two / "rewards with a KL, LoRA") if r["kind"] == "update"]
        assert max(kl) > 0

    def test_a_killed_run_is_the_straight_run(self, two: Path) -> None:
        """The run in "killed" against the one of the same settings, to the bit."""
        straight, killed = two / KILLED, two / "killed"
        assert rows_of(killed) == rows_of(straight)
        for file in (WEIGHTS["full"], *(f"checkpoints/step-000008/{n}.safetensors" for n in PARTS)):
            first, second = load_file(straight / file), load_file(killed / file)
            assert all(torch.equal(first[key], second[key]) for key in first)

    @pytest.mark.parametrize("name", [KILLED, "stored labels, LoRA"])
    def test_one_process_goes_on_where_two_were(
        self, settings: Settings, two: Path, tmp_path: Path, name: str
    ) -> None:
        """A checkpoint knows nothing of pieces."""
        one = tmp_path / "one"
        steps = RunFolder(two / name).steps()
        resume = f"run.resume={two / name / 'checkpoints' / f'step-{steps[0]:06d}'}"
        more = ["optim.micro_batch=2", "eval.prompts=null", resume]
        recipe.train(recipe.load(None, settings(name, one, *more)))
        before = load_file(
            two / name / "checkpoints" / f"step-{steps[0]:06d}" / "policy.safetensors"
        )
        for part in PARTS:
            file = f"checkpoints/step-{steps[1]:06d}/{part}.safetensors"
            ours, theirs = load_file(one / file), load_file(two / name / file)
            assert ours.keys() == theirs.keys()
            if part == "policy":
                assert moved(ours, theirs) < 1e-3 * moved(before, theirs)
