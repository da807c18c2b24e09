"""A run as files that others load: a diffusers LoRA or a merged pipeline, with a model card."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from d3po.policy import Policy
from d3po.run import RunFolder
from fifa.config import InputError, atomic_path


def export_lora(policy: Policy, folder: Path) -> None:
    """`pytorch_lora_weights.safetensors`, for `pipe.load_lora_weights(folder)`."""
    if policy.config.method != "lora":
        raise InputError(
            "this run trained the whole network, there is no LoRA; export it as merged"
        )
    policy.save(folder)


def export_merged(policy: Policy, folder: Path) -> None:
    """A whole pipeline, for `DiffusionPipeline.from_pretrained(folder)`."""
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(policy.family.name)
    with TemporaryDirectory(prefix=".tmp-", dir=folder.parent) as trained:
        policy.save(trained)
        if policy.config.method == "lora":
            pipe.load_lora_weights(trained)
            pipe.fuse_lora()
            pipe.unload_lora_weights()
        else:
            part = policy.family.denoiser_folder
            whole = type(getattr(pipe, part)).from_pretrained(Path(trained) / part)
            pipe.register_modules(**{part: whole})
    pipe.save_pretrained(folder)


FORMATS: dict[str, Callable[[Policy, Path], None]] = {"lora": export_lora, "merged": export_merged}

_LOADING = {
    "lora": "pipe = DiffusionPipeline.from_pretrained({model!r})\npipe.load_lora_weights('.')",
    "merged": "pipe = DiffusionPipeline.from_pretrained('.')",
}


def export(
    policy: Policy, run: RunFolder, settings: Mapping[str, Any], form: str, out: Path
) -> None:
    """Write the folder `out` as a whole: the weights in one of FORMATS, and README.md, the card.

    `settings` are those of the run, dotted key to value. Raises InputError for an unknown format,
    or if `out` is there already.
    """
    if form not in FORMATS:
        raise InputError(f"unknown format '{form}', known are {', '.join(FORMATS)}")
    if out.exists():
        raise InputError(f"{out} is there already; choose another folder or remove it")
    with atomic_path(out) as folder:
        folder.mkdir()
        FORMATS[form](policy, folder)
        card = model_card(settings, last_evaluation(run), form)
        (folder / "README.md").write_text(card, encoding="utf-8")


def last_evaluation(run: RunFolder) -> dict[str, Any] | None:
    """The newest "eval" line of the run's metrics."""
    if not run.metrics.exists():
        return None
    rows = [json.loads(line) for line in run.metrics.read_text(encoding="utf-8").splitlines()]
    found = [row for row in rows if row["kind"] == "eval"]
    return found[-1] if found else None


def model_card(settings: Mapping[str, Any], evaluation: Mapping[str, Any] | None, form: str) -> str:
    """Markdown: what it is, how to load it, what it was trained with, how it did."""
    shown: tuple[str, ...] = (
        "method",
        "objective.name",
        "objective.beta",
        "policy.method",
        "policy.rank",
    )
    shown += (
        "optim.learning_rate",
        "optim.max_steps",
        "sampler.steps",
        "sampler.guidance",
        "run.seed",
    )
    rows = [f"| {key} | {settings[key]} |" for key in shown if key in settings]
    lines = [
        "---",
        f"base_model: {settings['model']}",
        "library_name: diffusers",
        f"tags: [text-to-image, preference-optimization, {settings['method']}, {form}]",
        "---",
        "",
        f"{settings['model']}, fine-tuned on preferences ({settings['method']}).",
        "",
        "```python",
        "from diffusers import DiffusionPipeline",
        _LOADING[form].format(model=settings["model"]),
        "```",
        "",
        "| setting | value |",
        "|---|---|",
        *rows,
        "",
        *_results(evaluation),
    ]
    return "\n".join(lines)


def _results(evaluation: Mapping[str, Any] | None) -> list[str]:
    if evaluation is None:
        return ["The run was not evaluated.", ""]
    lines = [
        f"At step {evaluation['step']}, same prompts and seeds for both; 95% interval of the "
        "difference:",
        "",
        "| judge | before | after | difference | wins |",
        "|---|---|---|---|---|",
    ]
    for judge, result in evaluation["judges"].items():
        low, high = result["difference_interval"]
        wins = "all ties" if result["win_rate"] is None else f"{result['win_rate']:.1%}"
        lines.append(
            f"| {judge} | {result['reference']:.4g} | {result['policy']:.4g} "
            f"| {result['difference']:+.3g} ({low:+.3g} to {high:+.3g}) | {wins} |"
        )
    return [*lines, ""]
