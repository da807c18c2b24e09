"""Runs with a fault put in on purpose end with a sentence that names it; healthy ones pass."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from d3po import recipe
from d3po.run_folder import RunFolder
from fifa.config import InputError
from fifa.images import encode_png
from fifa.miniworld import prompts as world_prompts

STOP = ["health={stop: true, window: 4, rounds: 3}"]


class Brightness:
    """A reward that only likes brightness."""

    name, differentiable = "brightness", False

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        return images.mean((1, 2, 3)).float()


BRIGHT = f"{__name__}:Brightness"


def online(model: object, folder: Path, *overrides: str) -> list[str]:
    return [
        f"model={model}",
        "objective={name: d3po_clipped, beta: 10}",
        "optim={max_steps: 8, learning_rate: 1e-4}",
        "sampler={steps: 3, guidance: 1.0}",
        "online={groups: 1, images: 4, judges: [jpeg_incompressibility], prompt_count: 20}",
        "eval.grid_prompts=0",
        f"run={{dir: '{folder / 'run'}', checkpoint_every: 1, keep_checkpoints: 1}}",
        *overrides,
    ]


def offline(model: object, folder: Path, data: Path, *overrides: str) -> list[str]:
    return [
        f"model={model}",
        "method=dpo",
        "objective={name: dpo, beta: 2000}",
        "optim={max_steps: 8, learning_rate: 1e-5, micro_batch: 4}",
        "sampler={steps: 2, guidance: 1.0}",
        f"offline={{data: '{data}', cache: '{folder / 'cache'}', held_out_fraction: 0.5}}",
        "eval={prompts: heldout, count: 2, images: 2, every: 4, grid_prompts: 0}",
        "eval.judges=[jpeg_compressibility]",
        f"run={{dir: '{folder / 'run'}', checkpoint_every: 1}}",
        *overrides,
    ]


def lines(folder: Path, kind: str) -> list[dict[str, Any]]:
    text = (folder / "run" / "metrics.jsonl").read_text()
    return [row for row in map(json.loads, text.splitlines()) if row["kind"] == kind]


def smooth_and_noisy(path: Path, size: int, winner: str, count: int = 80) -> Path:
    """Pairs of a plain and a noisy picture: to a person who likes small files, the plain one."""
    rng = np.random.default_rng(0)
    rows: dict[str, list[Any]] = {
        key: [] for key in ("caption", "jpg_0", "jpg_1", "label_0", "label_1")
    }
    texts = world_prompts("train", count, 0)
    for i in range(count):
        plain = np.full((size, size, 3), rng.integers(0, 256, 3), dtype=np.uint8)
        noisy = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
        rows["caption"].append(texts[i])
        rows["jpg_0"].append(encode_png(plain))
        rows["jpg_1"].append(encode_png(noisy))
        rows["label_0"].append(1.0 if winner == "plain" else 0.0)
        rows["label_1"].append(0.0 if winner == "plain" else 1.0)
    pq.write_table(pa.table(rows), path)
    return path


def stopped(config: list[str]) -> str:
    with pytest.raises(InputError, match=r"stopped, as health\.stop asks: ") as caught:
        recipe.train(recipe.load(None, config))
    return str(caught.value)


# ---- four faults --------------------------------------------------------------------------------


def test_latents_that_are_nan(make_tiny_sd: Any, tmp_path: Path) -> None:
    model = make_tiny_sd("broken")
    file = model / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["conv_out.bias"][0] = torch.nan
    save_file(weights, file, {"format": "pt"})
    told = stopped(online(model, tmp_path, *STOP))
    assert "100% of the pictures of a round have latents that are NaN" in told
    (row,) = lines(tmp_path, "health")
    assert (row["check"], row["step"]) == ("nan", 0)
    assert lines(tmp_path, "round")[0]["pairs"] == 0  # they are in no pair


def test_a_learning_rate_that_explodes(tiny_sd: Path, tmp_path: Path) -> None:
    data = smooth_and_noisy(tmp_path / "pairs.parquet", 64, "plain")
    own = ["policy.method=full", "optim.learning_rate=0.1", "eval.every=0", "health.pairs=0"]
    told = stopped(offline(tiny_sd, tmp_path, data, *STOP, *own))
    assert "learning rate" in told
    assert "lower optim.learning_rate" in told
    assert lines(tmp_path, "health")[0]["check"] in ("sinking", "runaway", "gradient", "nan")


def test_a_reward_that_only_likes_brightness(tiny_sd: Path, tmp_path: Path) -> None:
    told = stopped(online(tiny_sd, tmp_path, *STOP, f"online.judges=[{BRIGHT}]"))
    assert "within a prompt the judge follows brightness (correlation +0.9" in told
    assert "add a judge that looks at the prompt" in told


def test_labels_with_the_wrong_sign(tiny_sd: Path, tmp_path: Path) -> None:
    data = smooth_and_noisy(tmp_path / "pairs.parquet", 64, "noisy")
    told = stopped(offline(tiny_sd, tmp_path, data, *STOP))
    assert "jpeg_compressibility on 0% only: winner and loser seem to be exchanged" in told
    assert lines(tmp_path, "update") == []  # before the first step


# ---- and none -----------------------------------------------------------------------------------


def test_a_healthy_offline_run_is_left_in_peace(tmp_path: Path) -> None:
    data = smooth_and_noisy(tmp_path / "pairs.parquet", 32, "plain", 24)
    recipe.train(recipe.load(None, offline("mini", tmp_path, data, "health.window=4")))
    assert lines(tmp_path, "health") == []
    (label,) = lines(tmp_path, "labels")
    assert label["agreement"] == {"jpeg_compressibility": 1.0}
    first, *_, last = lines(tmp_path, "held_out")
    assert (first["step"], first["accuracy"], first["margin"]) == (0, 0.5, 0.0)
    assert last["step"] == 8
    assert last["margin"] > 0  # what is learned carries over to pairs that were not trained on
    assert last["accuracy"] > 0.5


def test_held_out_pairs_begin_even_in_half_precision(tmp_path: Path) -> None:
    data = smooth_and_noisy(tmp_path / "pairs.parquet", 16, "plain", 24)
    more = ["run.mixed_precision=bf16", "optim.max_steps=1"]
    recipe.train(recipe.load(None, offline("mini", tmp_path, data, *more)))
    first = lines(tmp_path, "held_out")[0]
    assert (first["accuracy"], first["margin"], first["win_ratio"]) == (0.5, 0.0, 0.0)


def test_a_healthy_online_run_is_left_in_peace(tmp_path: Path) -> None:
    recipe.train(recipe.load(None, online("mini", tmp_path, "health={window: 4, rounds: 3}")))
    assert lines(tmp_path, "health") == []
    rounds = lines(tmp_path, "round")
    assert len(rounds) == 8
    assert all(0 < row["brightness"] < 1 and row["diversity"] > 0 for row in rounds)


# ---- the last good checkpoint -------------------------------------------------------------------


def test_a_stop_keeps_and_takes_the_last_good_checkpoint(tiny_sd: Path, tmp_path: Path) -> None:
    """The learning rate explodes after a long warm-up; the weights are those of before."""
    data = smooth_and_noisy(tmp_path / "pairs.parquet", 64, "plain", 24)
    own = ["policy.method=full", "optim={max_steps: 40, warmup_steps: 40, micro_batch: 2}"]
    own += ["optim.learning_rate=5e-2", "eval.every=0", "health.pairs=0", "run.keep_checkpoints=1"]
    stopped(offline(tiny_sd, tmp_path, data, *STOP, *own))
    (alarm,) = lines(tmp_path, "health")
    kept = sorted(int(p.name[5:]) for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert len(kept) == 3  # the good one, the next to become it, the newest
    good = kept[0]
    assert 1 <= good <= alarm["step"] - 4
    stored = load_file(tmp_path / "run" / "checkpoints" / f"step-{good:06d}" / "policy.safetensors")
    found = load_file(tmp_path / "run" / "weights" / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(found[name], stored[name]) for name in found)
    assert RunFolder(tmp_path / "run").step_of_weights() == good
