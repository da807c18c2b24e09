"""One self-contained HTML page about finished runs: pictures before and after, verdicts, curves.

The pictures are drawn again from the run's weights: reference and policy from the same noise, for
the first prompts of the evaluation, in their order. Nothing is chosen to look good. All words about
who gained and who lost are computed from intervals.

`record` reads a run folder, `verdicts` puts its evaluation in words, `sheets` draws its pictures,
`plots` its figures, `filtering` tells of the pairs; here they become a page.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from d3po.recipe import TrainConfig, arithmetic
from d3po.report.filtering import filter_section
from d3po.report.plots import html_curves, html_win_rates
from d3po.report.record import RunRecord, read_run
from d3po.report.sheets import SHEET_STYLE, Sheet, draw, html_sheets
from d3po.report.verdicts import Verdict, html_evaluation, verdict
from fifa.config import InputError, describe, to_yaml, write_atomic
from fifa.report import html_number, html_page, html_table, html_text
from fifa.report.page import Section

Progress = Callable[[str, int, int], None]  # stage, pictures done, pictures in all

METHODS = {
    "d3po": "D3PO, online: the model draws, a judge compares, it learns from its own pictures",
    "dpo": "Diffusion-DPO, offline: it learns from pairs of pictures that people compared",
}

_STYLE = """
h3 { font-size: 1rem; margin: 1.75rem 0 .6rem; }
:root { --bad: #b3402a; --wash: #fdf1e7; }
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
        sections.append(filter_section(Path(filtered), examples=3))
    sections += list(_run_sections(records, prompts, images, device, progress))
    title = "Before and after learning from preferences"
    subtitle = ", ".join(f"{r.name} ({len(r.updates)} updates)" for r in records)
    write_atomic(out, html_page(title, [*sections, *more], subtitle, SHEET_STYLE + _STYLE))
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
    return "\n".join(parts) + f'\n<p class="soft">{note}</p>{html_win_rates(records)}'


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
        parts += ["<h3>What the judges say</h3>", html_evaluation(record.evaluation)]
    parts += ["<h3>How it went</h3>", html_curves(record)]
    parts += ["<h3>Settings</h3>", _settings(record)]
    return "\n".join(parts)


# ---- settings -----------------------------------------------------------------------------------

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
