from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from pair_files import columns, write_pairs

from fifa.config import InputError
from fifa.filtering import SelectConfig, select
from fifa.images import decode
from fifa.report import (
    Card,
    Picture,
    html_images,
    html_number,
    html_page,
    html_plot,
    html_table,
    html_tiles,
    write_report,
)
from fifa.scoring import ScoreConfig, score

VOID = {"meta", "img", "br"}


class Balanced(HTMLParser):
    """Checks that every element is closed, and collects what a browser would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        assert tag not in {"script", "link", "iframe"}
        self.fetched += [v for k, v in attrs if k in {"src", "href", "xlink:href"} and v]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A selection of 6 of 40 pairs; a caption that is HTML, and an unreadable image."""
    folder = tmp_path_factory.mktemp("report")
    clean = columns(40)
    clean["caption"][0] = "a <script>alert(1)</script> & 'circle' in a \"frame\""
    clean["jpg_0"][8] = b"no image"
    data = write_pairs(folder / "a.parquet", **clean)
    score(ScoreConfig(data=data, out=folder / "s", reward="jpeg_incompressibility"))
    select(SelectConfig(scores=folder / "s", k=6, cap=0))
    return folder / "s"


def test_the_page_stands_alone_and_shows_what_happened(folder: Path) -> None:
    page = Balanced(write_report(folder, examples=4).read_text())
    assert page.fetched
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in page.fetched)
    assert "url(http" not in (folder / "report.html").read_text()
    for part in ("Kept: highest importance first (6)", "importance (chosen)", "ties", "random"):
        assert part in page.text
    assert "row 8 (a.parquet), jpg_0: cannot decode the image" in page.text


def test_captions_are_shown_not_executed(folder: Path) -> None:
    text = write_report(folder, examples=40).read_text()
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp;" in text
    assert "<script" not in text


def test_the_winner_is_marked(folder: Path) -> None:
    text = write_report(folder, examples=1).read_text()
    card = text[text.index('<div class="card">') :]
    marked = re.search(
        r"<figure class=marked><img class=tiny src=\"[^\"]+\" alt=\"([^\"]*)\"", card
    )
    plain = re.search(r"<figure><img class=tiny src=\"[^\"]+\" alt=\"([^\"]*)\"", card)
    assert marked
    assert plain
    assert marked[1].startswith("preferred, reward")
    assert plain[1].startswith("reward")


def test_the_same_numbers_are_there_as_json(folder: Path) -> None:
    text = Balanced(write_report(folder).read_text()).text
    numbers = json.loads((folder / "report.json").read_text())
    assert numbers["kept"] == 6
    assert sum(numbers["fates"].values()) == 40
    assert (
        numbers["terms"]["margin"]["kept"]["median"] > numbers["terms"]["margin"]["all"]["median"]
    )
    for value in (
        *numbers["objective"]["random"].values(),
        numbers["terms"]["margin"]["all"]["95%"],
    ):
        assert html_number(value) in text


def test_writing_twice_gives_the_same_bytes(folder: Path) -> None:
    first = write_report(folder).read_bytes()
    assert write_report(folder).read_bytes() == first


def test_without_a_selection_there_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no selection"):
        write_report(tmp_path)


def test_numbers_are_short_and_absent_ones_a_dash() -> None:
    values = [1234567, 0.000123456, 123456.7, True, "x", None, float("nan"), np.float32(0.5)]
    expected = ["1,234,567", "0.0001235", "123,457", "True", "x", "–", "–", "0.5"]
    assert [html_number(value) for value in values] == expected


def test_a_table_escapes_and_lines_up_numbers() -> None:
    text = html_table([{"a<b": "x & y", "n": 1}, {"a<b": "<i>", "n": None}])
    Balanced(text)
    assert "<th>a&lt;b</th>" in text
    assert '<td class="num">1</td>' in text
    assert "&lt;i&gt;" in text
    assert "Nothing" in html_table([])


def test_pictures_are_stored_small_and_exact_where_they_are_small() -> None:
    large = np.full((400, 200, 3), 9, dtype=np.uint8)
    small = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    text = html_images([Card([Picture(large, "large"), Picture(small, "<small>", True)], "t", "n")])
    page = Balanced(text)
    stored = [decode(base64.b64decode(link.split(",")[1]), "x") for link in page.fetched]
    assert [image.shape for image in stored] == [(160, 80, 3), (8, 8, 3)]
    assert np.array_equal(stored[1], small)
    assert "<small>" in page.text


def test_plots_take_the_colour_of_the_page_and_do_not_share_ids() -> None:
    def plot(end: float) -> str:
        figure = Figure()
        axes = figure.subplots()
        axes.plot([0, end], [0, 1], color="red", label="line")
        axes.set_title("title")
        axes.legend()
        return html_plot(figure)

    first, second = plot(1.0), plot(2.0)
    assert first.startswith("<svg")
    assert "currentColor" in first
    assert "#012345" not in first
    assert ">title</text>" in first  # text, not outlines
    ids = [set(re.findall(r'\bid="([^"]+)"', svg)) for svg in (first, second)]
    assert ids[0]
    assert not ids[0] & ids[1]
    for svg, own in zip((first, second), ids, strict=True):
        assert set(re.findall(r"url\(#([^)]+)\)|href=\"#([^\"]+)\"", svg)) - {("", "")}
        used = {a or b for a, b in re.findall(r"url\(#([^)]+)\)|href=\"#([^\"]+)\"", svg)}
        assert used <= own
    assert plot(1.0) == first


def test_a_page_is_whole() -> None:
    page = html_page("T <1>", [("S & T", html_tiles([("rows", 12_345)]))], "sub")
    parsed = Balanced(page.removeprefix("<!doctype html>"))
    assert "12,345" in parsed.text
    assert "T &lt;1&gt;</title>" in page
    assert "prefers-color-scheme: dark" in page
