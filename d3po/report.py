"""One self-contained HTML page about finished runs: pictures before and after, verdicts, curves.

The pictures are drawn again from the run's weights: reference and policy from the same noise, for
the first prompts of the evaluation, in their order. Nothing is chosen to look good. All words about
who gained and who lost are computed from intervals.
"""

from __future__ import annotations

import html
import importlib
import inspect
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from d3po.evaluate import Evaluation, JudgeResult, PromptResult, measure
from d3po.health import HealthConfig
from d3po.health.pictures import collapse
from d3po.recipe import TrainConfig, arithmetic, evaluation_prompts, load, load_run
from d3po.run_folder import RunFolder
from fifa.config import InputError, describe, to_yaml, write_atomic
from fifa.images import Pixels, data_uri, shrink
from fifa.pairs import PairTable
from fifa.report import (
    SIDE,
    filter_sections,
    html_number,
    html_page,
    html_plot,
    html_table,
    html_text,
)
from fifa.rewards import REWARDS, load_reward

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Section = tuple[str, str]  # heading, HTML
Progress = Callable[[str, int, int], None]  # stage, pictures done, pictures in all

METHODS = {
    "d3po": "D3PO, online: the model draws, a judge compares, it learns from its own pictures",
    "dpo": "Diffusion-DPO, offline: it learns from pairs of pictures that people compared",
}


# ---- a finished run -----------------------------------------------------------------------------


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
    folder = RunFolder(path)
    if not (folder.path / "config.yaml").is_file():
        raise InputError(f"{path} is not a run folder: it has no config.yaml")
    if not folder.weights.is_dir():
        raise InputError(f"the run in {path} has not ended; run its training command again")
    config = load(folder.path / "config.yaml")
    rows = _lines(folder.metrics)
    return RunRecord(
        path=folder.path,
        config=config,
        rounds=[row for row in rows if row["kind"] == "round"],
        updates=[row for row in rows if row["kind"] == "update" and "loss" in row],
        evaluation=_evaluation(folder, rows, config),
        seconds=_seconds(_lines(folder.timing)),
    )


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [_parsed(line, path) for line in path.read_text(encoding="utf-8").splitlines()]


def _parsed(text: str, path: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(text)
    except ValueError:
        raise InputError(f"{path} is damaged: {text[:40]!r} is not JSON") from None
    return values


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
        return _from_json(_parsed(file.read_text(encoding="utf-8"), file), file)
    found = [row for row in rows if row["kind"] == "eval"]
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


# ---- what it says, in words ---------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """An evaluation in words: one sentence for the top of a page, and what to be wary of."""

    summary: str
    warnings: tuple[str, ...]


def verdict(evaluation: Evaluation, trained_on: Sequence[str]) -> Verdict:
    """Who gained and who lost; a change counts if its 95% interval is clear of zero.

    Where a judge that was trained on gained while another lost, the policy has learned to please
    the judge at the other's expense, and the warning says so.
    """
    gained = [judge for judge in evaluation.judges if judge.difference_interval[0] > 0]
    lost = [judge for judge in evaluation.judges if judge.difference_interval[1] < 0]
    same = [judge for judge in evaluation.judges if judge not in gained + lost]
    parts = [
        f"{word} by {', '.join(_change(judge) for judge in judges)}"
        for word, judges in (("better", gained), ("worse", lost))
        if judges
    ]
    if same:
        parts.append(f"no clear difference by {', '.join(_change(judge) for judge in same)}")
    warnings = [_hacking(judge, lost) for judge in gained if judge.judge in trained_on and lost]
    warnings += [
        f"By {judge.judge}, which it was trained on, the policy lost ({_change(judge)}): the "
        f"training went the wrong way."
        for judge in lost
        if judge.judge in trained_on
    ]
    warnings += [f"{text[0].upper()}{text[1:]}." for text in _collapse(evaluation)]
    summary = "; ".join(parts)
    return Verdict(f"{summary[0].upper()}{summary[1:]}.", tuple(warnings))


def _change(judge: JudgeResult) -> str:
    """'oracle (0.61 to 0.72)'."""
    return f"{judge.judge} ({judge.reference:.3g} to {judge.policy:.3g})"


def _hacking(proxy: JudgeResult, lost: Sequence[JudgeResult]) -> str:
    price = " and ".join(
        f"{judge.judge} fell from {judge.reference:.3g} to {judge.policy:.3g} (95% of the change: "
        f"{judge.difference_interval[0]:+.2g} to {judge.difference_interval[1]:+.2g})"
        for judge in lost
    )
    return (
        f"Reward hacking: by {proxy.judge}, which it was trained on, the policy rose from "
        f"{proxy.reference:.3g} to {proxy.policy:.3g}, and in the same pictures {price}. It earns "
        f"the one at the expense of the other."
    )


def _collapse(evaluation: Evaluation) -> list[str]:
    found = collapse(*evaluation.pixel_diversity, HealthConfig().diversity)
    return [complaint.words for complaint in found]


def judge_meaning(judge: str) -> str:
    """The first paragraph of a reward's docstring; '' for one that REWARDS does not know."""
    if judge not in REWARDS:
        return ""
    module, _, name = REWARDS[judge].partition(":")
    text = inspect.getdoc(getattr(importlib.import_module(module), name)) or ""
    return re.sub(r" \(see [^)]*\)", "", " ".join(text.partition("\n\n")[0].split()))


# ---- pictures -----------------------------------------------------------------------------------

_STYLE = """
h3 { font-size: 1rem; margin: 1.75rem 0 .6rem; }
.sheets { display: flex; flex-wrap: wrap; gap: .9rem; align-items: stretch; }
.sheet { width: min-content; background: var(--card); border: 1px solid var(--line);
  border-radius: .6rem; padding: .7rem .8rem .5rem; break-inside: avoid; }
.sheet p { margin: 0 0 .5rem; font-size: .9rem; line-height: 1.3; overflow-wrap: anywhere; }
.sheet .rows { display: grid; gap: .35rem .4rem; align-items: center; }
.sheet .who { color: var(--soft); font-size: .75rem; writing-mode: vertical-rl;
  transform: rotate(180deg); text-align: center; }
.sheet img { display: block; border-radius: .25rem; image-rendering: pixelated;
  outline: 2px solid transparent; outline-offset: 0; }
.sheet figcaption { font-size: .72rem; color: var(--soft); text-align: center;
  font-variant-numeric: tabular-nums; padding-top: .1rem; }
.sheet .up img { outline-color: var(--good); } .sheet .up figcaption { color: var(--good); }
.sheet .down figcaption { color: var(--bad); } .sheet .down img { outline-color: var(--bad); }
:root { --bad: #b3402a; --wash: #fdf1e7; } .sheet .who.after { color: var(--ink); }
@media (prefers-color-scheme: dark) { :root { --bad: #f0876d; --wash: #33251c; } }
@media print { :root { --bad: #b3402a; --wash: #fdf1e7; } }
.judges td { white-space: nowrap; } .judges td:last-child { white-space: normal; }
.lead { font-size: 1.05rem; max-width: 52rem; } .lead b { font-weight: 600; }
.warning { background: var(--wash); border-left: 4px solid var(--bad); padding: .6rem .9rem;
  border-radius: .3rem; max-width: 52rem; }
details summary { cursor: pointer; color: var(--soft); font-size: .9rem; margin-top: .8rem; }
pre { overflow-x: auto; font-size: .82rem; line-height: 1.45; background: var(--card);
  border: 1px solid var(--line); border-radius: .4rem; padding: .7rem .9rem; }
"""


@dataclass(frozen=True, eq=False)
class Sheet:
    """The pictures of one prompt under reference and policy, and what the first judge gave them."""

    prompt: str
    reference: PromptResult
    policy: PromptResult


def draw(
    record: RunRecord,
    prompts: int,
    images: int,
    device: str = "cpu",
    advance: Callable[[int], None] = lambda done: None,
) -> list[Sheet]:
    """Draw the first `prompts` prompts of the run's evaluation, `images` pictures each, twice.

    The noise is that of the evaluation, so these are its pictures. Empty if the run has no
    evaluation prompts.
    """
    texts = evaluation_prompts(record.config)
    rows = range(min(prompts, len(texts)))
    if not rows:
        return []
    config, policy = load_run(record.path, device)
    rewards = [load_reward(config.eval.judges[0])]
    half = len(rows) * images

    def drawn(before: int) -> list[PromptResult]:
        return measure(
            policy.family,
            policy.bare,
            config.sampler,
            rewards,
            texts,
            images,
            config.eval.seed,
            rows,
            keep_pictures=lambda row: True,
            advance=lambda done: advance(before + done),
        )

    with policy.reference():
        reference = drawn(0)
    both = zip(reference, drawn(half), strict=True)
    return [Sheet(texts[row], *results) for row, results in zip(rows, both, strict=True)]


def html_sheets(sheets: Sequence[Sheet]) -> str:
    """The sheets side by side, reference above policy, equal noise in equal columns."""
    return f'<div class="sheets">\n{"".join(_sheet(sheet) for sheet in sheets)}</div>'


def _sheet(sheet: Sheet) -> str:
    columns = len(sheet.reference.pictures)
    rows = ""
    for who, mark, own in (("before", "", sheet.reference), ("after", " after", sheet.policy)):
        rows += f'<span class="who{mark}">{who}</span>\n'
        for k, picture in enumerate(own.pictures):
            score, before = float(own.scores[k, 0]), float(sheet.reference.scores[k, 0])
            change = "up" if score > before else "down" if score < before else ""
            rows += _figure(picture, f"{score:.2f}", change, f"{who}: {sheet.prompt}")
    return (
        f'<div class="sheet"><p>{html.escape(sheet.prompt)}</p>\n<div class="rows" '
        f'style="grid-template-columns: auto repeat({columns}, auto)">\n{rows}</div></div>\n'
    )


def _figure(picture: Pixels, caption: str, mark: str, alt: str) -> str:
    small = shrink(picture, SIDE)
    height, width = (size * max(1, 104 // max(small.shape[:2])) for size in small.shape[:2])
    return (
        f'<figure{f" class={mark}" if mark else ""}><img src="{data_uri(small)}" width="{width}" '
        f'height="{height}" alt="{html.escape(alt)}"><figcaption>{caption}</figcaption></figure>\n'
    )


# ---- tables -------------------------------------------------------------------------------------


def judge_rows(evaluation: Evaluation) -> list[dict[str, Any]]:
    """The evaluation as rows of a table, a judge each."""
    return [
        {
            "judge": judge.judge,
            "before": judge.reference,
            "after": judge.policy,
            "change": f"{judge.difference:+.3g}",
            "95% interval": _span(judge.difference_interval, "+.3g"),
            "wins": "–" if judge.win_rate is None else f"{judge.win_rate:.0%}",
            "95%": "–"
            if judge.win_rate_interval is None
            else _span(judge.win_rate_interval, ".0%"),
            "ties": judge.ties,
            "what it measures": judge_meaning(judge.judge),
        }
        for judge in evaluation.judges
    ]


def _span(interval: tuple[float, float], form: str) -> str:
    return f"{interval[0]:{form}} to {interval[1]:{form}}"


def _evaluation_html(evaluation: Evaluation) -> str:
    after, before = evaluation.pixel_diversity
    told = (
        f"{evaluation.prompts} prompts that training never saw, {evaluation.images} pictures each, "
        f"before and after from the same noise. Intervals of the change: bootstrap over prompts. "
        f"Wins: share of picture pairs that the judge ranks higher after training, ties left out. "
    )
    if np.isfinite(before) and np.isfinite(after):
        told += (
            f"Diversity: two pictures of one prompt differ by {before:.3f} before and "
            f"{after:.3f} after ({after / before - 1:+.0%}; root mean square over pixels)."
        )
    return f'<div class="judges">{html_table(judge_rows(evaluation))}</div>{html_text(told)}'


_SETTINGS = (
    "model",
    "objective.name",
    "objective.beta",
    "policy.method",
    "policy.rank",
    "optim.learning_rate",
    "sampler.steps",
    "sampler.guidance",
    "online.judges",
    "online.step_count",
    "offline.data",
    "run.seed",
)


def _settings(record: RunRecord) -> str:
    meanings = {setting.key: setting.description for setting in describe(TrainConfig)}
    rows = [
        {"setting": key, "value": _shown(value), "meaning": meanings.get(key, "")}
        for key in _SETTINGS
        if (value := _get(record.config, key)) is not None
    ]
    return (
        f"{html_table(rows)}<pre>{html.escape(arithmetic(record.config))}</pre>"
        f"<details><summary>All settings</summary>"
        f"<pre>{html.escape(to_yaml(record.config))}</pre></details>"
    )


def _get(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = None if config is None else getattr(config, part)
    return config


def _shown(value: Any) -> str:
    return ", ".join(value) if isinstance(value, tuple) else html_number(value)


# ---- curves -------------------------------------------------------------------------------------

Curve = tuple[str, list[int], list[float]]  # title, steps, values

_WATCHED = {
    "accuracy": "trained pairs ordered as judged (share)",
    "margin": "margin over the reference (log-ratio)",
    "clipped": "ratios outside the clip band (share)",
    "grad_norm": "gradient norm",
    "loss": "loss",
}


def curves(record: RunRecord) -> list[Curve]:
    """What happened during training, by optimizer step; empty and constant curves left out."""
    found: list[Curve] = []
    for judge in record.trained_on:
        steps = [row["step"] for row in record.rounds]
        found.append((f"reward of the rollouts: {judge}", steps, _column(record.rounds, judge)))
    for key, title in _WATCHED.items():
        rows = [row for row in record.updates if key in row]
        values = [np.nan if row[key] is None else row[key] for row in rows]
        found.append((title, [row["step"] for row in rows], values))
    return [curve for curve in found if len(set(curve[2])) > 1]


def _column(rounds: Sequence[Mapping[str, Any]], judge: str) -> list[float]:
    return [row["reward"].get(judge, np.nan) for row in rounds]


def _curves_html(record: RunRecord) -> str:
    from matplotlib.figure import Figure

    found = curves(record)
    if not found:
        return html_text("The run recorded no curve.")
    lines = -(-len(found) // 3)
    figure = Figure(figsize=(11, 2.5 * lines), layout="constrained")
    panels = figure.subplots(lines, 3, squeeze=False).ravel()
    for axes, curve in zip(panels, found, strict=False):
        _plot(axes, curve)
    for axes in panels[len(found) :]:
        axes.set_visible(False)
    told = "By optimizer step; grey as measured, blue the mean over its neighbours."
    return html_plot(figure) + html_text(told)


def _plot(axes: Axes, curve: Curve) -> None:
    from matplotlib.ticker import MaxNLocator

    title, steps, values = curve
    smooth = running_mean(np.array(values), max(1, len(values) // 12))
    axes.plot(steps, values, color="#8b8d98", alpha=0.5, linewidth=0.8)
    axes.plot(steps, smooth, color="#2f7ed8", linewidth=1.8)
    axes.set_title(title, fontsize=9.5, loc="left")
    axes.tick_params(labelsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.01)


def running_mean(values: NDArray[np.float64], half: int) -> NDArray[np.float64]:
    """Mean over a window of `half` values to each side, cut at the ends; NaN are left out."""
    known = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    places = np.arange(len(values))
    first = np.maximum(places - half, 0)
    last = np.minimum(places + half + 1, len(values))
    found = counts[last] - counts[first]
    return np.divide(
        sums[last] - sums[first], found, out=np.full(len(values), np.nan), where=found > 0
    )


# ---- the filter ---------------------------------------------------------------------------------


def hidden_truth(folder: Path) -> list[dict[str, Any]]:
    """How right the labels are, among all pairs and among the kept, by what filters cannot see.

    `folder` is where `fifa select` wrote. Empty where the data set has no `truth_*` columns: only a
    simulation knows the truth.
    """
    selection = json.loads((folder / "selection.json").read_text(encoding="utf-8"))
    rows = []
    for name, path in (("all", selection["data"]), ("kept", folder / "kept.parquet")):
        if not {"truth_utility_0", "truth_annotator"} <= set(PairTable.open(path).schema.names):
            return []
        rows.append({"among": name, **_truth(path)})
    return rows


def _truth(path: str | Path) -> dict[str, Any]:
    labels, utilities = ["label_0", "label_1"], ["truth_utility_0", "truth_utility_1"]
    hidden = ["truth_annotator", "truth_flipped", "truth_prompt_kind"]
    table = pq.read_table(path, columns=[*labels, *utilities, *hidden])
    label = table["label_0"].to_numpy() - table["label_1"].to_numpy()
    truth = table["truth_utility_0"].to_numpy() - table["truth_utility_1"].to_numpy()
    decided = label != 0
    odd = ~np.isin(table["truth_prompt_kind"].to_numpy(), ["fresh", "popular", "near_duplicate"])
    careless = table["truth_annotator"].to_numpy() == "careless"
    return {
        "pairs": len(table),
        "label agrees with the truth": float((label * truth > 0)[decided].mean()),
        "difference in utility": float(np.abs(truth).mean()),
        "careless judge": float(careless.mean()),
        "wrong button": float(table["truth_flipped"].to_numpy().mean()),
        "prompt about nothing": float(odd.mean()),
    }


def _filter_section(folder: Path, examples: int) -> Section:
    sections, _ = filter_sections(folder, examples, brief=True)
    inner = "".join(f"<h3>{html.escape(head)}</h3>\n{body}\n" for head, body in sections)
    if truth := hidden_truth(folder):
        percent = [
            {
                name: f"{value:.1%}"
                if isinstance(value, float) and "utility" not in name
                else value
                for name, value in row.items()
            }
            for row in truth
        ]
        inner += (
            "<h3>What the filter could not see</h3>\n"
            + html_text(
                "The people of this data set are simulated, so the truth is known. It stands in "
                "columns that no filter reads, and serves only to judge the choice afterwards."
            )
            + html_table(percent)
        )
    return "The pairs: what FiFA kept", inner


# ---- the page -----------------------------------------------------------------------------------


def write_report(
    runs: Sequence[str | Path],
    out: str | Path,
    filtered: str | Path | None = None,
    prompts: int = 9,
    images: int = 3,
    device: str = "cpu",
    more: Sequence[Section] = (),
    progress: Progress = lambda stage, done, total: None,
) -> Path:
    """Write one page about finished runs, and about the filter in folder `filtered`; its path.

    `prompts` sheets of `images` pictures are drawn for each run (0: none); `more` are sections
    (heading, HTML) for the end. Raises InputError if a folder holds no finished run or no filter.
    """
    records = [read_run(path) for path in runs]
    if not records:
        raise InputError("a report needs at least one run folder")
    sections = [("In short", _summary(records))]
    if filtered is not None:
        sections.append(_filter_section(Path(filtered), examples=3))
    sections += list(_run_sections(records, prompts, images, device, progress))
    title = "Before and after learning from preferences"
    subtitle = ", ".join(f"{r.name} ({len(r.updates)} updates)" for r in records)
    write_atomic(out, html_page(title, [*sections, *more], subtitle, _STYLE))
    return Path(out)


def _summary(records: Sequence[RunRecord]) -> str:
    parts = []
    for record in records:
        told = Verdict("It was trained without an evaluation.", ())
        if record.evaluation:
            told = verdict(record.evaluation, record.trained_on)
        parts.append(
            f'<p class="lead"><b>{html.escape(record.name)}</b> '
            f"({html.escape(METHODS[record.config.method].partition(',')[0])}): "
            f"{html.escape(told.summary)}</p>"
        )
        parts += [f'<p class="warning">{html.escape(text)}</p>' for text in told.warnings]
    note = "Numbers are means over the same held-out prompts and noise, before and after."
    return "\n".join(parts) + f'\n<p class="soft">{note}</p>{_wins_html(records)}'


def win_rates(records: Sequence[RunRecord]) -> list[tuple[str, float, tuple[float, float]]]:
    """(run: judge, win rate, 95% interval) of all judges that saw a difference."""
    return [
        (f"{record.name}: {judge.judge}", judge.win_rate, judge.win_rate_interval)
        for record in records
        if record.evaluation
        for judge in record.evaluation.judges
        if judge.win_rate is not None and judge.win_rate_interval is not None
    ]


def _wins_html(records: Sequence[RunRecord]) -> str:
    from matplotlib.figure import Figure

    rows = win_rates(records)
    if not rows:
        return ""
    figure = Figure(figsize=(9, 0.6 + 0.28 * len(rows)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(50, color="#8b8d98", linewidth=1, linestyle=(0, (4, 3)))
    for place, (_, rate, (low, high)) in enumerate(rows):
        colour = "#2f9e6e" if low > 0.5 else "#d9603f" if high < 0.5 else "#8b8d98"
        axes.plot([100 * low, 100 * high], [place, place], color=colour, linewidth=3)
        axes.plot([100 * rate], [place], "o", color=colour, markersize=7)
    axes.set_yticks(range(len(rows)), [name for name, _, _ in rows], fontsize=9)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, 100)
    title = "how often a judge prefers the picture after training, % (95% interval; 50: no change)"
    axes.set_title(title, fontsize=9.5, loc="left")
    axes.tick_params(labelsize=8.5, left=False)
    axes.spines[["top", "right", "left"]].set_visible(False)
    return html_plot(figure)


def _run_sections(
    records: Sequence[RunRecord], prompts: int, images: int, device: str, progress: Progress
) -> Iterator[Section]:
    for record in records:

        def advance(done: int, name: str = f"drawing {record.name}") -> None:
            progress(name, done, 2 * prompts * images)

        sheets = draw(record, prompts, images, device, advance) if prompts else []
        yield f"{record.name}: before and after", _run_html(record, sheets)


def _run_html(record: RunRecord, sheets: Sequence[Sheet]) -> str:
    took = f" took {record.seconds / 60:.1f} minutes" if record.seconds else ""
    done = f"{METHODS[record.config.method]}. {len(record.updates)} optimizer steps{took}."
    parts = [html_text(done)]
    if sheets:
        judge = record.config.eval.judges[0]
        parts += [
            html_sheets(sheets),
            html_text(
                f"The first {len(sheets)} held-out prompts, not chosen. Pictures in one column "
                f"grew from the same noise; below each is its score by {judge}, green where it "
                f"rose, red where it fell."
            ),
        ]
    if record.evaluation:
        parts += ["<h3>What the judges say</h3>", _evaluation_html(record.evaluation)]
    parts += ["<h3>How it went</h3>", _curves_html(record)]
    parts += ["<h3>Settings</h3>", _settings(record)]
    return "\n".join(parts)
