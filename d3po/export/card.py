"""The model card: what it is, how to load it, what it learned from, how, and how it did."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from d3po.run_folder import RunFolder

SHOWN = (
    "method",
    "objective.name",
    "objective.beta",
    "objective.reduce",
    "policy.method",
    "policy.rank",
    "policy.alpha",
    "policy.ema_decay",
    "optim.learning_rate",
    "optim.warmup_steps",
    "optim.micro_batch",
    "optim.accumulation",
    "optim.max_steps",
    "sampler.steps",
    "sampler.eta",
    "sampler.guidance",
    "run.mixed_precision",
    "run.seed",
)
LORA_ONLY = ("policy.rank", "policy.alpha")
SELECTION = "selection.json"  # what `fifa select` writes beside the pairs that it keeps


def model_card(
    settings: Mapping[str, Any],
    evaluation: Mapping[str, Any] | None,
    loading: str,
    picture: str | None = None,
) -> str:
    """Markdown with the metadata block of the Hub.

    `settings` are those of the run, dotted key to value, `loading` the code that loads the files,
    `picture` the file name of a grid of pictures before and after.
    """
    model, method = settings["model"], settings["method"]
    lines = [
        "---",
        *([] if _is_local(model) else [f"base_model: {model}"]),
        "library_name: diffusers",
        "pipeline_tag: text-to-image",
        f"tags: [text-to-image, preference-optimization, {method}]",
        "---",
        "",
        f"{model}, fine-tuned on preferences ({method}).",
        "",
        "```python",
        loading,
        "```",
        "",
        *_data(settings),
        *_settings(settings),
        *_results(evaluation),
        *([f"![Before and after training]({picture})", ""] if picture else []),
    ]
    return "\n".join(lines)


def last_evaluation(run: RunFolder, step: int | None = None) -> dict[str, Any] | None:
    """The newest "eval" line of the run's metrics, not newer than `step`."""
    rows = [row for row in run.rows() if row["kind"] == "eval"]
    found = [row for row in rows if step is None or row["step"] <= step]
    return found[-1] if found else None


def _is_local(model: str) -> bool:
    """Whether it is the embedded model or a path: the Hub knows no such base model."""
    return model == "mini" or Path(model).exists()


def _data(settings: Mapping[str, Any]) -> list[str]:
    if "offline.data" in settings:
        data = Path(settings["offline.data"])
        lines = [f"Trained on the pairs of `{data.name}`.", ""]
        return lines + _selection((data if data.is_dir() else data.parent) / SELECTION)
    if "online.prompts" not in settings:
        return []
    judge = settings.get("online.labels") or ", ".join(settings.get("online.judges") or ())
    return [
        f"Trained on its own pictures of {settings['online.prompts']}, judged by {judge}.",
        "",
    ]


def _selection(summary: Path) -> list[str]:
    """How FiFA chose the pairs, if it did."""
    if not summary.is_file():
        return []
    told = json.loads(summary.read_text(encoding="utf-8"))
    scored, own = told["scored_with"], told["settings"]
    agreement = told["agreement"]
    rows = {
        "kept": f"{told['kept']:,} of {told['eligible']:,} eligible pairs",
        "prompts": f"{told['prompts']['kept']:,} of {told['prompts']['all']:,}",
        "margin of": scored["reward"],
        "agrees with people": f"{agreement['kept']:.1%} of what was kept, "
        f"{agreement['all']:.1%} of all",
        **{f"select.{key}": own[key] for key in sorted(own) if _is_number_or_word(key, own[key])},
    }
    return [
        "Chosen by FiFA (Yang et al. 2024):",
        "",
        "| filter | value |",
        "|---|---|",
        *(f"| {key} | {value} |" for key, value in rows.items()),
        "",
    ]


def _is_number_or_word(key: str, value: Any) -> bool:
    return isinstance(value, (int, float, str)) and key not in ("scores", "data", "out")


def _settings(settings: Mapping[str, Any]) -> list[str]:
    left_out = () if settings.get("policy.method") == "lora" else LORA_ONLY
    options = {k: v for k, v in settings.items() if k.startswith("objective.options.")}
    shown = {key: settings[key] for key in SHOWN if key in settings and key not in left_out}
    rows = [f"| {key} | {value} |" for key, value in {**shown, **options}.items()]
    return ["| setting | value |", "|---|---|", *rows, ""]


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
