from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from matplotlib.figure import Figure
from pair_files import columns, write_pairs

from fifa.config import InputError
from fifa.filtering import SelectConfig, select
from fifa.images import decode
from fifa.knn import knn_distances
from fifa.report import (
    Bar,
    Card,
    Picture,
    html_bars,
    html_images,
    html_number,
    html_page,
    html_plot,
    html_table,
    html_tiles,
    write_report,
)
from fifa.report.prompt_map import html_map, prompt_map
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
    margins = numbers["histograms"]["margin"]
    widths = np.diff(margins["edges"])
    assert widths @ margins["all"] == pytest.approx(1)
    assert widths @ margins["kept"] == pytest.approx(1)
    for value in (
        *numbers["objective"]["random"].values(),
        numbers["terms"]["margin"]["all"]["95%"],
    ):
        assert html_number(value) in text


def test_every_number_of_the_page_is_in_the_json(folder: Path) -> None:
    """What a reader sees as a number, in tables, tiles and bars, can be read from report.json."""
    text = write_report(folder).read_text()
    numbers = json.loads((folder / "report.json").read_text())
    known = set(every_number(numbers))
    told = {html_number(value) for value in known} | {f"{value:.1%}" for value in known}
    total = sum(numbers["fates"].values())
    told |= {f"{count / total:.1%}" for count in numbers["fates"].values()}
    told |= {html_number(total), "–", ""}
    cells = re.findall(r'<td class="num">([^<]*)</td>|<b>([^<]+)</b>', text)
    cells += re.findall(r'<span class="(?:num|share)">([^<]*)</span>()', text)
    assert len(cells) > 80
    assert {a or b for a, b in cells} <= told


def every_number(value: object) -> list[float]:
    """All numbers inside a JSON value."""
    if isinstance(value, dict):
        return [number for inner in value.values() for number in every_number(inner)]
    if isinstance(value, list):
        return [number for inner in value for number in every_number(inner)]
    return [value] if isinstance(value, (int, float)) and not isinstance(value, bool) else []


def test_agreement_by_margin_is_told_with_intervals(folder: Path) -> None:
    """Quarters of the 29 strict pairs by |margin|, counted here from the score table."""
    text = Balanced(write_report(folder).read_text()).text
    margin = pq.read_table(folder / "scores.parquet")["margin"].drop_null().to_numpy()
    ordered = margin[np.argsort(np.abs(margin), kind="stable")]
    parts = [ordered[:7], ordered[7:14], ordered[14:22], ordered[22:]]
    measured = json.loads((folder / "report.json").read_text())["agreement_by_margin"]
    assert measured["strict"] == len(margin) == 29
    for part, quarter in zip(parts, measured["quarters"], strict=True):
        right = ((part > 0) + 0.5 * (part == 0)).mean()
        assert quarter["agreement"]["value"] == pytest.approx(right)
        low, high = (
            proportion_limit(right, len(part), side) for side in (-1.959963985, 1.959963985)
        )
        assert quarter["agreement"]["low"] == pytest.approx(low)
        assert f"{low:.1%} to {high:.1%}" in text
    assert "Of 29 pairs in which a person preferred one picture (10 ties left out)" in text


def proportion_limit(p: float, n: int, z: float) -> float:
    """The p0 from which p lies z standard errors of p0 away: Wilson's limits are its roots."""
    from scipy.optimize import brentq

    def off(p0: float) -> float:
        return (p0 - p) - z * np.sqrt(p0 * (1 - p0) / n)

    return p if abs(p - (z > 0)) < 1e-12 else brentq(off, p, 1.0 if z > 0 else 0.0)


def test_the_effect_of_each_weight_is_that_of_selecting_by_it(folder: Path, tmp_path: Path) -> None:
    write_report(folder)
    rows = json.loads((folder / "report.json").read_text())["weights"]
    assert [(row["alpha"], row["gamma"]) for row in rows] == [
        (0.5, 0.5), (0, 0.5), (1, 0.5), (0.5, 0), (0.5, 1), (0, 0)
    ]  # fmt: skip
    kept = []
    for row in rows:
        weights = {"alpha": row["alpha"], "gamma": row["gamma"]}
        select(SelectConfig(scores=folder, k=6, cap=0, out=tmp_path, **weights))
        fates = pq.read_table(tmp_path / "selection.parquet")["fate"].to_pylist()
        kept.append({i for i, fate in enumerate(fates) if fate == "kept"})
    for row, chosen in zip(rows, kept, strict=True):
        assert row["overlap"] == len(chosen & kept[0]) / len(chosen | kept[0])
    text = Balanced((folder / "report.html").read_text()).text
    exchanged = len(kept[-1] - kept[0])
    assert exchanged
    assert f"{exchanged} ({exchanged / 6:.0%})" in text


def test_the_map_holds_every_prompt_once_and_escapes_it(folder: Path) -> None:
    text = write_report(folder).read_text()
    numbers = json.loads((folder / "report.json").read_text())
    points = numbers["map"]["points"]
    assert len(points) == len({point["prompt_id"] for point in points})
    assert len(points) == numbers["map"]["kept"] + numbers["map"]["not_kept"]
    assert sum(point["kept"] for point in points) == numbers["prompts"]["kept"]
    drawn = text[text.index('<svg class="map"') :]
    drawn = drawn[: drawn.index("</svg>")]
    assert drawn.count("<circle") == len(points)
    assert drawn.count("class=marked") == numbers["prompts"]["kept"]
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in drawn
    by_id = {point["prompt_id"]: point["prompt"] for point in points}
    scores = pq.read_table(folder / "scores.parquet", columns=["row", "prompt_id"]).to_pylist()
    captions = pq.read_table(folder.parent / "a.parquet")["caption"].to_pylist()
    for score_row in reversed(scores):
        first = next(s["row"] for s in scores if s["prompt_id"] == score_row["prompt_id"])
        assert by_id[score_row["prompt_id"]] == captions[first]


def test_a_map_puts_near_prompts_near_and_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three tight clusters: the nearest on paper belongs to the same one."""
    monkeypatch.setattr("fifa.report.prompt_map.KEPT_SHOWN", 40)
    monkeypatch.setattr("fifa.report.prompt_map.OTHERS_SHOWN", 80)
    rng = np.random.default_rng(0)
    centres = np.eye(8)[:3]
    x = np.repeat(centres, 50, axis=0) + rng.normal(0, 0.03, (150, 8))
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    kept = np.arange(150) % 3 == 0
    found = prompt_map(x, kept)
    assert (found.kept_of, found.others_of) == (50, 100)
    assert (int(found.kept.sum()), int((~found.kept).sum())) == (40, 80)
    assert np.array_equal(found.kept, kept[found.prompt])
    cluster = found.prompt // 50
    gaps = np.linalg.norm(found.place[:, None] - found.place[None], axis=2)
    np.fill_diagonal(gaps, np.inf)
    assert (cluster[gaps.argmin(axis=1)] == cluster).mean() > 0.99
    shown = x[found.prompt]
    np.testing.assert_allclose(found.distance, knn_distances(shown, 1), rtol=1e-5)
    np.testing.assert_allclose(
        np.linalg.norm(shown - shown[found.nearest], axis=1), found.distance, rtol=1e-4
    )
    assert np.array_equal(prompt_map(x, kept).place, found.place)
    assert found.place.min() >= 0


@pytest.mark.parametrize("count", [1, 2, 3, 11, 12])
def test_a_few_prompts_have_a_map_too(count: int) -> None:
    x = np.eye(12, dtype=np.float32)[:count]
    found = prompt_map(x, np.arange(count) == 0)
    assert np.isfinite(found.place).all()
    assert len(np.unique(found.place, axis=0)) == count
    svg = Balanced(html_map(found, [f"prompt <{i}>" for i in range(count)]))
    assert "prompt <0>" in svg.text


def test_equal_prompts_still_have_a_map() -> None:
    x = np.tile(np.eye(4, dtype=np.float32)[:1], (20, 1))
    assert np.isfinite(prompt_map(x, np.arange(20) < 3).place).all()


def test_bars_show_counts_and_shares() -> None:
    text = html_bars([Bar("kept <1>", 1, True), Bar("gone", 3)])
    assert "kept <1>" in Balanced(text).text
    assert re.findall(r'<i( class=marked)? style="width:([\d.]+)%">', text) == [
        (" class=marked", "25.00"),
        ("", "75.00"),
    ]
    assert "25.0%" in text
    assert "NaN" not in html_bars([Bar("nothing", 0)])


@pytest.mark.parametrize("changed", [{"k": 1}, {"k": "100%", "method": "random"}])
def test_one_pair_and_all_pairs_have_a_page_too(
    folder: Path, tmp_path: Path, changed: dict[str, object]
) -> None:
    """A single pair has no entropy, a choice by chance no weights; they lie beside the scores."""
    select(SelectConfig(scores=folder, out=tmp_path, **changed))
    text = Balanced(write_report(tmp_path, examples=1).read_text()).text
    numbers = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert (numbers["objective"]["margin"]["f"] is None) == (changed["k"] == 1)
    assert "kept the same pairs each time" in text
    assert sum(point["kept"] for point in numbers["map"]["points"]) == numbers["prompts"]["kept"]


def test_a_selection_of_another_version_is_one_sentence(folder: Path, tmp_path: Path) -> None:
    select(SelectConfig(scores=folder, out=tmp_path, k=2))
    summary = json.loads((tmp_path / "selection.json").read_text())
    summary["settings"]["temperature"] = 3
    (tmp_path / "selection.json").write_text(json.dumps(summary))
    with pytest.raises(InputError, match="run `fifa select` again"):
        write_report(tmp_path)


def test_other_data_or_scores_than_those_selected_from_are_one_sentence(tmp_path: Path) -> None:
    data, scores = tmp_path / "a.parquet", tmp_path / "s"
    settings = {"data": data, "out": scores, "reward": "jpeg_incompressibility"}
    write_pairs(data, **columns(12))
    score(ScoreConfig(**settings))
    select(SelectConfig(scores=scores, k=2))
    write_report(scores)
    score(ScoreConfig(**settings, embedder="tfidf:8"))
    with pytest.raises(InputError, match=r"anew after the selection, with another embedder; run"):
        write_report(scores)
    write_pairs(data, **{**columns(12), "caption": [f"another {i}" for i in range(12)]})
    with pytest.raises(InputError, match=r"a\.parquet has changed since the selection"):
        write_report(scores)


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
