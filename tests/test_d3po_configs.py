"""Every config of a real model trains a step on a tiny model of its family, its own settings on."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_pipelines
from conftest import build_tiny_sd
from pair_files import write_pairs

from d3po import recipe
from d3po.families import find_source

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
TINY: dict[str, Callable[[Path], Path]] = {
    "sd15": build_tiny_sd,
    "sdxl": lambda folder: tiny_pipelines.save(tiny_pipelines.sdxl, folder),
    "sd3": lambda folder: tiny_pipelines.save(tiny_pipelines.sd3, folder),
    "flux": lambda folder: tiny_pipelines.save(tiny_pipelines.flux, folder),
}
REAL = [path for path in sorted(CONFIGS.glob("*.yaml")) if path.name.split("_")[0] in TINY]
# What is said of a number: whose it is, or that it is a person's own.
SOURCE = re.compile(
    r"D3PO|Diffusion-DPO|Wallace|Flow-GRPO|Linear-DPO|Flow-DPO|diffusers|Pipeline|KTO|ours|the same"
    r"|its (default|code)|published"
)
NUMBERS = (
    "beta:",
    "rank:",
    "learning_rate:",
    "max_steps:",
    "micro_batch:",
    "steps:",
    "eta:",
    "guidance:",
    "groups:",
    "images:",
    "weight_decay:",
    "warmup_steps:",
    "noise:",
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tiny")
    return {name: build(folder / name) for name, build in TINY.items()}


def test_there_is_one_for_every_family_and_method() -> None:
    names, methods = {path.stem for path in REAL}, ("d3po", "dpo", "ipo", "kto")
    assert {f"{model}_{method}" for model in TINY for method in methods} <= names


@pytest.mark.parametrize("path", REAL, ids=lambda path: path.name)
def test_it_says_where_its_numbers_come_from(path: Path) -> None:
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.strip().startswith(NUMBERS):
            assert SOURCE.search(line.partition("#")[2]), f"{path.name}: whose is it? {line}"


@pytest.mark.parametrize("path", REAL, ids=lambda path: path.name)
def test_it_trains_a_step_on_a_tiny_model(
    path: Path, models: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle\ntwo green triangles\n")
    (tmp_path / "eval_prompts.txt").write_text("a purple star\n")
    model = models[path.name.split("_")[0]]
    smaller = [
        f"model={model}",
        "family.image_size=64",
        "optim={max_steps: 1, micro_batch: 1, accumulation: 1}",
        "sampler.steps=3",
        f"run={{dir: {tmp_path / 'run'}, mixed_precision: 'no', checkpoint_every: 0}}",
        "eval.judges=[jpeg_compressibility]",
        "eval.count=1",
        "eval.images=1",
    ]
    config = recipe.load(path)
    if config.online is not None:
        smaller += [f"online.prompts={tmp_path / 'prompts.txt'}", "online.groups=1"]
        smaller += ["online.judges=[jpeg_compressibility]", "online.images=3"]
        smaller += [f"eval.prompts={tmp_path / 'eval_prompts.txt'}"]
        smaller += ["online.step_count=1"] if config.online.step_count else []
    else:
        pairs = write_pairs(tmp_path / "pairs.parquet", rows=4)
        smaller += [f"offline={{data: {pairs}, cache: {tmp_path / 'cache'}}}", "eval.prompts=null"]
    run = recipe.train(recipe.load(path, smaller))
    rows = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    (update,) = [row for row in rows if row["kind"] == "update"]
    assert update["images" if config.objective.name == "kto" else "pairs"] > 0
    assert update["grad_norm"] > 0
    assert update["skipped"] == 0


def test_tiny_models_are_of_the_kind_that_the_configs_name(models: dict[str, Path]) -> None:
    kinds = {name: find_source(folder).index["_class_name"] for name, folder in models.items()}
    assert kinds == {
        "sd15": "StableDiffusionPipeline",
        "sdxl": "StableDiffusionXLPipeline",
        "sd3": "StableDiffusion3Pipeline",
        "flux": "FluxPipeline",
    }
