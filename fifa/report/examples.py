"""Pairs of each fate with their pictures and numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from fifa.config import finite
from fifa.filtering import CHOSEN, DENIED, FULL, LOWER, POOR, TIE, UNJUDGED
from fifa.images import decode
from fifa.pairs import PairTable
from fifa.report.page import Card, Picture, Section, html_images

SHOWN = (
    (CHOSEN, "Kept: highest importance first", "descending"),
    (LOWER, "Dropped: lowest importance first", "ascending"),
    (FULL, "Dropped although important: their prompts had their share", "descending"),
    (POOR, "Dropped: text below the minimum", "row"),
    (DENIED, "Dropped: on the deny list", "row"),
    (UNJUDGED, "Dropped: text without a score", "row"),
    (TIE, "Dropped: ties, from which no preference can be learned", "row"),
)


def example_sections(
    table: PairTable, scores: pa.Table, count: int, shown: Sequence[tuple[str, str, str]]
) -> tuple[list[Section], dict[str, list[dict[str, Any]]]]:
    """Cards of some pairs of each fate, and their numbers."""
    sections, numbers = [], {}
    fates = scores["fate"].to_numpy()
    importance = scores["importance"].to_numpy()
    for fate, title, order in shown:
        found = np.flatnonzero(fates == fate)
        if order != "row":
            sign = -1 if order == "descending" else 1
            found = found[np.argsort(sign * importance[found], kind="stable")]
        if len(found):
            pairs = scores.take(found[:count]).to_pylist()
            rows = sorted(pair["row"] for pair in pairs)
            source = table.read_rows(rows, ["caption", "jpg_0", "jpg_1"]).to_pylist()
            by_row = dict(zip(rows, source, strict=True))
            cards = [_pair_card(pair, by_row[pair["row"]]) for pair in pairs]
            sections.append((f"{title} ({len(found):,})", html_images(cards)))
            told = [{**pair, "caption": by_row[pair["row"]]["caption"]} for pair in pairs]
            numbers[fate] = finite(told)
    return sections, numbers


def _pair_card(score: dict[str, Any], source: dict[str, Any]) -> Card:
    pictures = [
        Picture(
            decode(source[f"jpg_{side}"], f"row {score['row']}"),
            f"{'preferred, ' if score['win'] == side else ''}reward {score[f'reward_{side}']:.3g}",
            score["win"] == side,
        )
        for side in (0, 1)
    ]
    parts = [f"row {score['row']}"]
    if score["margin"] is not None:
        parts.append(f"margin {score['margin']:.3g}")
    if score["quality"] is not None:
        parts.append(f"text {score['quality']:.3g} ({score['quality_reason']})")
    parts.append(f"diversity {score['log_knn']:.2f}")
    if score["importance"] is not None:
        parts.append(f"importance {score['importance']:.2f}")
    return Card(pictures, source["caption"][:300], ", ".join(parts))
