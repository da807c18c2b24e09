"""What FiFA kept, and where people are simulated, how right their labels really were."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from fifa.pairs import PairTable
from fifa.report import filter_sections, html_table, html_text
from fifa.report.page import Section


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


def filter_section(folder: Path, examples: int) -> Section:
    """What was kept, with `examples` pairs of each kind, and the hidden truth where it is known."""
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
