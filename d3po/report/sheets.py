"""Contact sheets: the pictures of a prompt before and after training, drawn again from the weights.

Nothing is chosen to look good: the prompts are the first ones of the evaluation, in their order,
and equal columns grew from equal noise.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from d3po.evaluate import PromptResult, measure
from d3po.judging import Rewards
from d3po.recipe import evaluation_prompts, load_run
from d3po.report.record import RunRecord
from fifa.images import Pixels, data_uri, shrink
from fifa.report import SIDE

SHEET_STYLE = """
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
.sheet .who.after { color: var(--ink); }
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
    rewards = Rewards(device)(config.eval.judges[:1])
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
