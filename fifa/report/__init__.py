"""One self-contained HTML page: what was kept, what was dropped, and why; the same as JSON.

`page` holds pieces that any page may be built from, `sections` those of a filter, `prompt_map` the
map of its prompts.
"""

from __future__ import annotations

import json
from pathlib import Path

from fifa.config import write_atomic
from fifa.report.page import (
    SIDE,
    Bar,
    Card,
    Picture,
    html_bars,
    html_images,
    html_number,
    html_page,
    html_plot,
    html_plots,
    html_table,
    html_text,
    html_tiles,
)
from fifa.report.prompt_map import MAP_STYLE
from fifa.report.sections import filter_sections

__all__ = [
    "NUMBERS",
    "PAGE",
    "SIDE",
    "Bar",
    "Card",
    "Picture",
    "filter_sections",
    "html_bars",
    "html_images",
    "html_number",
    "html_page",
    "html_plot",
    "html_plots",
    "html_table",
    "html_text",
    "html_tiles",
    "write_report",
]

PAGE = "report.html"
NUMBERS = "report.json"
TITLE = "FiFA: which pairs were kept"


def write_report(folder: str | Path, examples: int = 8) -> Path:
    """Write report.html and report.json beside the selection in `folder`; the page's path.

    `folder` is where `fifa select` wrote. `examples` is the number of pairs shown of each kind.
    Raises InputError if there is no selection, or what it was made from is gone.
    """
    folder = Path(folder)
    sections, numbers = filter_sections(folder, examples)
    subtitle = f"{numbers['data']}, method {numbers['settings']['method']}"
    write_atomic(folder / NUMBERS, json.dumps(numbers, indent=2, ensure_ascii=False) + "\n")
    write_atomic(folder / PAGE, html_page(TITLE, sections, subtitle, MAP_STYLE))
    return folder / PAGE
