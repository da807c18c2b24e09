"""What the folder of a finished run says: its settings, curves, time and evaluation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from d3po.evaluate import Evaluation
from d3po.recipe import TrainConfig, evaluation_prompts, run_config
from d3po.run_folder import RunFolder, parsed
from fifa.config import InputError


@dataclass(frozen=True)
class RunRecord:
    """What a run folder says about a finished run."""

    path: Path
    config: TrainConfig
    rounds: list[dict[str, Any]]  # lines of metrics.jsonl, by kind
    updates: list[dict[str, Any]]
    evaluation: Evaluation | None
    seconds: float  # of training, interruptions not counted

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.resolve().name

    @property
    def trained_on(self) -> tuple[str, ...]:
        """The judges that the policy was trained to please; none where people chose."""
        return self.config.online.judges if self.config.online else ()


def read_run(path: str | Path) -> RunRecord:
    """Read a run folder; InputError if it is none or its training has not ended."""
    config, folder = run_config(path), RunFolder(path)
    if not folder.weights.is_dir():
        raise InputError(f"the run in {path} has not ended; run its training command again")
    rows = folder.rows()
    return RunRecord(
        path=folder.path,
        config=config,
        rounds=[row for row in rows if row["kind"] == "round"],
        updates=[row for row in rows if row["kind"] == "update" and "loss" in row],
        evaluation=_evaluation(folder, rows, config),
        seconds=_seconds(folder.times()),
    )


def _seconds(timing: Sequence[Mapping[str, float]]) -> float:
    """Each process counts from its own start, so a fall marks a resumption."""
    times = [row["seconds"] for row in timing]
    ends = [now for now, then in zip(times, [*times[1:], 0.0], strict=True) if then < now]
    return sum(ends)


def _evaluation(
    folder: RunFolder, rows: Sequence[Mapping[str, Any]], config: TrainConfig
) -> Evaluation | None:
    """What `d3po evaluate` found, if that is younger than the weights, else the run's own."""
    file = folder.path / "evaluation.json"
    if file.is_file() and file.stat().st_mtime >= folder.weights.stat().st_mtime:
        return _from_json(parsed(file.read_text(encoding="utf-8"), file), file)
    last = folder.step_of_weights()  # older than the run where health.stop ended it
    own = [row for row in rows if row["kind"] == "eval"]
    found = [row for row in own if last is None or row["step"] <= last]
    if not found:
        return None
    judges = [{"judge": name, **values} for name, values in found[-1]["judges"].items()]
    pairs = {
        key: [found[-1][key][who] for who in ("policy", "reference")]
        for key in PAIRED
        if key in found[-1]
    }
    sizes = {
        "prompts": len(evaluation_prompts(config)),
        "images": config.eval.images,
        "seed": config.eval.seed,
    }
    return _from_json({**sizes, "judges": judges, **pairs}, folder.metrics)


PAIRED = ("pixel_diversity", "latent_diversity", "brightness", "saturation")  # policy, reference


def _from_json(values: Mapping[str, Any], where: Path) -> Evaluation:
    """JSON has null where a single picture has no distance, or a tone was not measured."""
    pairs = {
        key: tuple(math.nan if number is None else number for number in values[key])
        for key in PAIRED
        if key in values
    }
    try:
        return TypeAdapter(Evaluation).validate_python({**values, **pairs})
    except ValidationError as error:
        key = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise InputError(f"{where} holds no evaluation ('{key}' is missing or wrong)") from None
