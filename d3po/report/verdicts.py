"""An evaluation as a reader meets it: a verdict in words, and a table with a line a judge."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from d3po.evaluate import Evaluation, JudgeResult
from d3po.health import HealthConfig
from d3po.health.pictures import collapse
from d3po.health.verdicts import FEWEST_PROMPTS
from fifa.report import html_table, html_text
from fifa.rewards import REWARDS

# ---- in words -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """An evaluation in words: one sentence for the top of a page, and what to be wary of."""

    summary: str
    warnings: tuple[str, ...]


def verdict(evaluation: Evaluation, trained_on: Sequence[str]) -> Verdict:
    """Who gained and who lost; a change counts if its 95% interval is clear of zero.

    Fewer than FEWEST_PROMPTS prompts decide nothing.

    Where a judge that was trained on gained while another lost, the policy has learned to please
    the judge at the other's expense, and the warning says so.
    """
    few = evaluation.prompts < FEWEST_PROMPTS
    told = () if few else evaluation.judges
    gained = [judge for judge in told if judge.difference_interval[0] > 0]
    lost = [judge for judge in told if judge.difference_interval[1] < 0]
    same = [judge for judge in evaluation.judges if judge not in gained + lost]
    parts = [
        f"{word} by {', '.join(_change(judge) for judge in judges)}"
        for word, judges in (("better", gained), ("worse", lost))
        if judges
    ]
    if few:
        changes = ", ".join(_change(judge) for judge in same)
        parts.append(f"{evaluation.prompts} prompts are too few to say who is better: {changes}")
    elif same:
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
    """'oracle (0.61 to 0.72)', with as many digits as tell the two apart; three if six do not."""
    for digits in (3, 4, 5, 6, 3):
        form = f".{digits}g" if digits == 3 else f"#.{digits}g"  # 6.300 to 6.302
        before, after = f"{judge.reference:{form}}", f"{judge.policy:{form}}"
        if before != after:
            break
    return f"{judge.judge} ({before} to {after})"


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


# ---- as a table --------------------------------------------------------------------------------


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


def html_evaluation(evaluation: Evaluation) -> str:
    """The table of judges, and below it how it was measured and how the pictures differ."""
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
