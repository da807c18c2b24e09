"""The main job, end to end, on the embedded mini model: pairs, filter, two trainings, a report.

Every stage is what a public command does (the page's last section lists them), and leaves a mark
with a fingerprint of its settings and of all that came before. The same call again skips what is
done and goes on where it was cut off; other settings in the same folder are refused.
"""

from __future__ import annotations

import html
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from d3po.evaluate import EvalConfig, Evaluation
from d3po.families import MINI
from d3po.generate import SamplerConfig
from d3po.losses import ObjectiveConfig
from d3po.offline import OfflineConfig
from d3po.online.settings import OnlineConfig
from d3po.policy import PolicyConfig
from d3po.recipe import TrainConfig
from d3po.report import write_report
from d3po.report.filtering import hidden_truth
from d3po.report.record import read_run
from d3po.report.verdicts import verdict
from d3po.run import RunConfig
from d3po.trainer import OptimConfig
from fifa.config import InputError, fingerprint, finite, to_yaml, write_atomic
from fifa.filtering import KEPT, SUMMARY, SelectConfig, select
from fifa.miniworld.dataset import write_dataset
from fifa.report import write_report as write_filter_report
from fifa.report.page import Section
from fifa.rewards.mini import WEIGHTS as REWARD_WEIGHTS
from fifa.scoring import ScoreConfig, score

Show = Callable[[str, int, int, str], None]  # task, done, total, a few words
Say = Callable[[str], None]

REWARD = "mini"  # the proxy that FiFA scores with
JUDGED = "oracle"  # what D3PO learns to please: how much of the prompt is in the picture
JUDGES = ("oracle", "oracle_strict", "mini", "neatness")  # who compares before and after


@dataclass(frozen=True)
class Sizes:
    """How much work the stages are."""

    pairs: int  # of the data set
    keep: str  # by FiFA; its paper keeps 0.5%, of a data set many times as large
    dpo_steps: int
    dpo_batch: int  # pairs
    d3po_steps: int
    groups: int  # prompts of a round of D3PO, all in one update
    group_images: int
    sampler_steps: int
    eval_prompts: int
    eval_images: int
    sheets: int  # prompts that the report shows of each run


FULL = Sizes(
    pairs=10_000,
    keep="1%",
    dpo_steps=120,
    dpo_batch=32,
    d3po_steps=80,
    groups=16,
    group_images=8,
    sampler_steps=20,
    eval_prompts=128,
    eval_images=4,
    sheets=9,
)
QUICK = Sizes(
    pairs=120,
    keep="10%",
    dpo_steps=4,
    dpo_batch=4,
    d3po_steps=2,
    groups=2,
    group_images=3,
    sampler_steps=5,
    eval_prompts=4,
    eval_images=2,
    sheets=2,
)


# ---- the two trainings --------------------------------------------------------------------------


def trainings(out: Path, seed: int, sizes: Sizes) -> dict[str, TrainConfig]:
    """The settings of both runs: Diffusion-DPO on what FiFA kept, D3PO on its own rollouts.

    Those of configs/mini_fifa_dpo.yaml and configs/mini_d3po_alignment.yaml, which say why.
    """
    policy = PolicyConfig(method="full")
    together = min(4, sizes.groups)  # groups that go through the network at once
    dpo = TrainConfig(
        method="dpo",
        objective=ObjectiveConfig(name="dpo", beta=2000),
        policy=policy,
        optim=OptimConfig(
            max_steps=sizes.dpo_steps,
            learning_rate=5e-6,
            warmup_steps=sizes.dpo_steps // 6,
            micro_batch=sizes.dpo_batch,
            weight_decay=1e-2,
        ),
        sampler=SamplerConfig(steps=sizes.sampler_steps, guidance=1.0),
        offline=OfflineConfig(
            data=str(out / "filter" / KEPT),
            empty_prompts=0.1,
            noise=(0.5, 1.0),
            cache=str(out / "cache"),
        ),
        eval=_compared(sizes, JUDGES),
        run=_kept_in(out / "dpo", seed),
    )
    d3po = TrainConfig(
        method="d3po",
        objective=ObjectiveConfig(name="d3po_clipped", beta=10.0, options={"clip": 0.1}),
        policy=policy,
        optim=OptimConfig(
            max_steps=sizes.d3po_steps,
            learning_rate=1e-4,
            warmup_steps=sizes.d3po_steps // 8,
            micro_batch=together,
            accumulation=sizes.groups // together,
        ),
        sampler=SamplerConfig(steps=sizes.sampler_steps // 2, guidance=1.0),
        online=OnlineConfig(
            groups=sizes.groups,
            images=sizes.group_images,
            judges=(JUDGED,),
            steps="early",
            step_count=min(4, sizes.sampler_steps // 2 - 1),
            skip_last=True,
        ),
        eval=_compared(sizes, (JUDGED, *(judge for judge in JUDGES if judge != JUDGED))),
        run=_kept_in(out / "d3po", seed),
    )
    return {"dpo": dpo, "d3po": d3po}


def _kept_in(folder: Path, seed: int) -> RunConfig:
    """bfloat16 is twice as fast as float32 on a CPU that knows it."""
    return RunConfig(dir=str(folder), seed=seed, mixed_precision="bf16", checkpoint_every=25)


def _compared(sizes: Sizes, judges: Sequence[str]) -> EvalConfig:
    """Before the first step and after the last one."""
    return EvalConfig(
        prompts="miniworld:heldout",
        count=sizes.eval_prompts,
        images=sizes.eval_images,
        every=0,
        judges=tuple(judges),
        grid_prompts=0,
    )


def train_together(configs: Mapping[str, TrainConfig], out: Path, show: Show) -> None:
    """Train all at once, each in a process of its own, from where its run folder left off.

    One thread each: networks this small gain nothing from a second one. What a process prints goes
    to <name>.log. Raises InputError with its last line if one fails; the others are then ended.
    """
    running = {name: _started(config, name, out) for name, config in configs.items()}
    try:
        while running:
            for name, process in list(running.items()):
                show(f"training {name}", *_progress(out / f"{name}.log", configs[name]))
                if process.poll() is not None:
                    del running[name]
                    _check(name, process.returncode, out / f"{name}.log")
            time.sleep(0.5)
    finally:
        for process in running.values():
            process.terminate()
            process.wait()


def _started(config: TrainConfig, name: str, out: Path) -> subprocess.Popen[bytes]:
    file = out / f"{name}.yaml"
    write_atomic(file, to_yaml(config))
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    with (out / f"{name}.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "d3po.cli", "train", str(file)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **threads, "PYTHONUNBUFFERED": "1"},
        )


_STEP = re.compile(r"^training (\d+)/(\d+)  (.*)$", re.MULTILINE)


def _progress(log: Path, config: TrainConfig) -> tuple[int, int, str]:
    """How far a training is, by the lines that it prints into a pipe."""
    steps = _STEP.findall(log.read_text(encoding="utf-8", errors="replace"))
    if not steps:
        return 0, config.optim.max_steps, "judging the base model"
    done, total, text = steps[-1]
    words = text.split("  ")
    brief = "  ".join(words if len(words) < 3 else [*words[:2], words[-1]])
    return int(done), int(total), "judging the result" if done == total else brief


def _check(name: str, code: int, log: Path) -> None:
    if code == 0:
        return
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no output"]
    reason = lines[-1].removeprefix("error: ")
    raise InputError(f"training {name} ended with code {code}: {reason} (all it said is in {log})")


# ---- the stages ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """A part of the job: what it depends on besides earlier stages, what it leaves behind."""

    name: str
    title: str
    settings: Mapping[str, Any]
    output: str  # in the demo's folder
    work: Callable[[], None]


def stages(out: Path, seed: int, sizes: Sizes, show: Show) -> list[Stage]:
    """The whole job in order."""
    configs = trainings(out, seed, sizes)

    def pairs() -> None:
        write_dataset(
            out / "data",
            rows=sizes.pairs,
            seed=seed,
            progress=lambda done, total: show("painting and judging pairs", done, total, ""),
        )

    def filtered() -> None:
        config = ScoreConfig(data=out / "data", out=out / "filter", reward=REWARD)
        score(config, lambda task, done, total: show(task, done, total, ""))
        select(SelectConfig(scores=out / "filter", k=sizes.keep))
        write_filter_report(out / "filter")

    def report() -> None:
        write_report(
            [out / name for name in configs],
            out / "report.html",
            filtered=out / "filter",
            prompts=sizes.sheets,
            more=[_commands(out, seed, sizes, configs)],
            progress=lambda task, done, total: show(task, done, total, ""),
        )
        text = json.dumps(finite(summary(out, seed, sizes, list(configs))), indent=2)
        write_atomic(out / "summary.json", text + "\n")

    kept = f"keeping the best {sizes.keep}"
    return [
        Stage("data", f"{sizes.pairs:,} noisy pairs", {"seed": seed}, "data", pairs),
        Stage("filter", kept, {"reward": fingerprint(REWARD_WEIGHTS)}, f"filter/{KEPT}", filtered),
        Stage(
            "train",
            "training on what was kept, and on its own pictures",
            {"model": fingerprint(MINI)}
            | {name: config.model_dump(mode="json") for name, config in configs.items()},
            "d3po/weights",
            lambda: train_together(configs, out, show),
        ),
        Stage("report", "drawing before and after", {}, "summary.json", report),
    ]


def run_demo(out: str | Path, seed: int, quick: bool, show: Show, say: Say) -> dict[str, Any]:
    """Do the job in the folder `out`, or finish it; returns what summary.json says.

    `show` is told of progress within a stage, `say` gets a line for each stage. Raises InputError
    if the folder holds a demo with other settings, or a part of the job fails.
    """
    out, sizes, total = Path(out), QUICK if quick else FULL, 0.0
    chain = fingerprint("d3po demo", version("d3po-fifa"), json.dumps(asdict(sizes)))
    for stage in stages(out, seed, sizes, show):
        chain = fingerprint(chain, stage.name, json.dumps(stage.settings, sort_keys=True))
        mark = _mark(out, stage, chain)
        if mark is None:
            begun = time.monotonic()
            say(f"{stage.title} ...")
            stage.work()
            mark = {"fingerprint": chain, "seconds": round(time.monotonic() - begun, 1)}
            write_atomic(_mark_file(out, stage.name), json.dumps(mark) + "\n")
            word = "done"
        else:
            word = "done before"
        total += mark["seconds"]
        say(f"{stage.title}: {word}, {mark['seconds']:.0f} s ({total:.0f} s so far)")
    return json.loads((out / "summary.json").read_text(encoding="utf-8"))


def _mark_file(out: Path, stage: str) -> Path:
    return out / "stages" / f"{stage}.json"


def _mark(out: Path, stage: Stage, expected: str) -> dict[str, Any] | None:
    """The mark of a finished stage; None if it is not finished, or what it left is gone."""
    file = _mark_file(out, stage.name)
    if not file.exists():
        return None
    mark: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if mark["fingerprint"] != expected:
        raise InputError(
            f"{out} holds a demo of another seed, size or version (stage '{stage.name}'); choose "
            f"another --out or remove the folder"
        )
    return mark if (out / stage.output).exists() else None


# ---- what came of it ----------------------------------------------------------------------------


def summary(out: Path, seed: int, sizes: Sizes, runs: Sequence[str]) -> dict[str, Any]:
    """The job in numbers, for machines."""
    selection = json.loads((out / "filter" / SUMMARY).read_text(encoding="utf-8"))
    return {
        "seed": seed,
        "sizes": asdict(sizes),
        "filter": {
            "pairs": sizes.pairs,
            "kept": selection["kept"],
            "reward_agrees_with_people": selection["agreement"],
            "hidden_truth": {row.pop("among"): row for row in hidden_truth(out / "filter")},
        },
        "runs": {name: _run_summary(out / name) for name in runs},
        "report": str(out / "report.html"),
    }


def _run_summary(folder: Path) -> dict[str, Any]:
    record = read_run(folder)
    found = record.evaluation
    assert isinstance(found, Evaluation)  # both configs ask for one
    told = verdict(found, record.trained_on)
    return {
        "method": record.config.method,
        "steps": len(record.updates),
        "seconds": round(record.seconds, 1),
        "trained_on": list(record.trained_on) or ["pairs"],
        "prompts": found.prompts,
        "images": found.images,
        "judges": {judge.judge: _judge_summary(asdict(judge)) for judge in found.judges},
        "diversity": dict(zip(("after", "before"), found.pixel_diversity, strict=True)),
        "verdict": told.summary,
        "warnings": list(told.warnings),
    }


def _judge_summary(judge: dict[str, Any]) -> dict[str, Any]:
    names = {"reference": "before", "policy": "after"}
    return {names.get(key, key): value for key, value in judge.items() if key != "judge"}


def _commands(out: Path, seed: int, sizes: Sizes, configs: Mapping[str, TrainConfig]) -> Section:
    runs = [str(out / name) for name in configs]
    lines = [
        f"fifa world --out {out / 'data'} --rows {sizes.pairs} --seed {seed}",
        f"fifa score {out / 'data'} --out {out / 'filter'} --reward {REWARD}",
        f"fifa select {out / 'filter'} -k {sizes.keep}",
        f"fifa report {out / 'filter'}",
        *(f"d3po train {run}.yaml" for run in runs),
        f"d3po report {' '.join(runs)} --filter {out / 'filter'} --out {out / 'report.html'}",
    ]
    return "The same by hand", f"<pre>{html.escape(chr(10).join(lines))}</pre>"
