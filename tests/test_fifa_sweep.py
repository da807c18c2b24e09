from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from matplotlib.figure import Figure
from pair_files import columns, write_pairs
from PIL import Image
from typer.testing import CliRunner

from fifa.cli import app
from fifa.config import InputError, load_config
from fifa.filtering import SelectConfig, candidates, select
from fifa.scoring import ScoreConfig, read_manifest, score
from fifa.selection.terms import zscore
from fifa.sweep import Point, Sweep, SweepConfig, draw, jaccard, sweep, weight_effects


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scores of 160 pairs, of which 40 are ties and one has no picture."""
    folder = tmp_path_factory.mktemp("sweep")
    rows = columns(160)
    rows["jpg_0"][8] = b"no image"
    data = write_pairs(folder / "a.parquet", **rows)
    score(ScoreConfig(data=data, out=folder / "s", reward="jpeg_incompressibility"))
    return folder / "s"


@pytest.fixture(scope="module")
def config(folder: Path) -> SweepConfig:
    return SweepConfig(
        scores=folder,
        k="10%",
        sizes=("5%", "100%", "1", "16"),
        methods=("importance", "random"),
        alphas=(0, 2),
        gammas=(0, 4),
        grid=True,
    )


@pytest.fixture(scope="module")
def swept(config: SweepConfig) -> Sweep:
    return sweep(config)


def kept_rows(folder: Path, tmp_path: Path, **changed: object) -> list[int]:
    """The rows that `fifa select` keeps."""
    select(SelectConfig(scores=folder, out=tmp_path, **changed))
    fates = pq.read_table(tmp_path / "selection.parquet")
    return np.flatnonzero(np.array(fates["fate"].to_pylist()) == "kept").tolist()


def test_points_are_what_select_would_keep_measured_by_hand(
    folder: Path, swept: Sweep, tmp_path: Path
) -> None:
    """Terms, entropy and shares again, from the score table and numpy alone."""
    scores = pq.read_table(folder / "scores.parquet")
    margin, quality = scores["margin"].to_numpy(), scores["quality"].to_numpy().astype(float)
    strict = np.isfinite(margin)
    log_knn = scores["log_knn"].to_numpy().astype(float)[strict]
    vectors = np.load(folder / read_manifest(folder)["embeddings"]).astype(float)
    row, prompt = scores["row"].to_numpy(), scores["prompt_id"].to_numpy()
    reward = [scores[f"reward_{side}"].to_numpy().astype(float) for side in (0, 1)]
    exact = np.where(scores["win"].to_numpy() == 0, reward[0] - reward[1], reward[1] - reward[0])
    scaled = {name: np.full(len(row), np.nan) for name in ("margin", "quality")}
    scaled["margin"][strict] = zscore(exact[strict])
    scaled["quality"][strict] = zscore(quality[strict])
    sets = {}
    for point in swept.sizes:
        kept = kept_rows(folder, tmp_path, k=point.wanted, method=point.method)
        sets[point.method, point.wanted] = set(kept)
        at = np.flatnonzero(np.isin(row, kept))
        x = vectors[prompt[at]]
        distance = np.sqrt(((x[:, None] - x[None]) ** 2).sum(2)) + 9 * np.eye(len(at))
        assert point.kept == len(kept)
        assert point.prompts == len(set(prompt[at]))
        assert point.margin == pytest.approx(scaled["margin"][at].mean())
        assert point.quality == pytest.approx(scaled["quality"][at].mean())
        right = (margin[at] > 0).mean() + 0.5 * (margin[at] == 0).mean()
        assert point.agreement.value == pytest.approx(right)
        usual = sets["importance", point.wanted]
        assert point.overlap == pytest.approx(len(usual & set(kept)) / len(usual | set(kept)))
        if len(kept) == 1:
            assert point.entropy is None
            assert point.f is None
            continue
        inside = np.log(np.maximum(distance.min(1), 0.01)).mean()
        entropy = (inside - log_knn.mean()) / log_knn.std()
        assert point.entropy == pytest.approx(entropy, abs=1e-5)
        assert point.f == pytest.approx(point.margin + 0.5 * point.quality + 0.5 * point.entropy)


def test_sizes_are_sorted_and_count_all_rows(swept: Sweep) -> None:
    assert swept.rows == 160
    assert swept.eligible == 119
    assert [point.wanted for point in swept.sizes] == [1, 8, 16, 160] * 2
    assert swept.sizes[3].kept == swept.sizes[3].prompts < 119  # one pair of a prompt


def test_one_weight_changes_at_a_time_and_the_configured_one_is_there(
    folder: Path, swept: Sweep, tmp_path: Path
) -> None:
    weights = {part: [(p.alpha, p.gamma) for p in getattr(swept, part)] for part in PARTS}
    assert weights["alphas"] == [(0, 0.5), (0.5, 0.5), (2, 0.5)]
    assert weights["gammas"] == [(0.5, 0), (0.5, 0.5), (0.5, 4)]
    assert weights["grid"] == [(a, g) for a in (0, 0.5, 2) for g in (0, 0.5, 4)]
    assert {p.overlap for p in swept.alphas if p.alpha == 0.5} == {1.0}
    usual, changed = (set(kept_rows(folder, tmp_path, k=16, gamma=gamma)) for gamma in (0.5, 4))
    found = next(p for p in swept.gammas if p.gamma == 4)
    assert found.overlap == len(usual & changed) / len(usual | changed) < 1
    assert found == next(p for p in swept.grid if (p.alpha, p.gamma) == (0.5, 4))


PARTS = ("alphas", "gammas", "grid")


def test_the_files_hold_the_points_and_are_the_same_every_time(
    folder: Path, config: SweepConfig, swept: Sweep
) -> None:
    files = [folder / name for name in ("sweep.json", "sweep.png")]
    before = [file.read_bytes() for file in files]
    stored = json.loads(before[0])
    assert stored["settings"]["k"] == "10%"
    assert [point["kept"] for point in stored["sizes"]] == [point.kept for point in swept.sizes]
    assert stored["sizes"][0]["entropy"] is None
    assert set(stored["sizes"][0]["agreement"]) == {"pairs", "value", "low", "high"}
    with Image.open(files[1]) as picture:
        assert picture.size == (1560, 1430)
    heard: list[tuple[int, int]] = []
    assert sweep(config, lambda stage, done, total: heard.append((done, total))) == swept
    assert heard == [(i, 23) for i in range(1, 24)]
    assert [file.read_bytes() for file in files] == before


def test_every_panel_shows_its_numbers(swept: Sweep) -> None:
    figure = draw(swept)
    assert isinstance(figure, Figure)
    panels = figure.axes
    assert len(panels) == 9
    lines = {line.get_label(): line for line in panels[1].get_lines()}
    assert set(lines) == {"importance", "random"}
    np.testing.assert_allclose(lines["random"].get_xdata(), [0.625, 5, 10, 100])
    np.testing.assert_allclose(
        lines["random"].get_ydata(), [point.margin for point in swept.sizes[4:]]
    )
    quality = panels[6].get_lines()[1]
    np.testing.assert_allclose(quality.get_ydata(), [point.quality for point in swept.alphas])
    figure.draw_without_rendering()
    boxes = [axes.get_tightbbox() for axes in panels]
    for i, box in enumerate(boxes):  # titles, ticks and legends of two panels never meet
        assert not any(box.overlaps(other) for other in boxes[i + 1 :])


def test_the_report_hears_what_each_weight_does(folder: Path) -> None:
    config = SelectConfig(scores=folder, k=16)
    terms = candidates(config, read_manifest(folder)).terms
    effects = dict(weight_effects(terms, config, 16))
    usual = effects["as configured"]
    assert usual.overlap == 1
    assert (effects["text quality counts twice"].alpha, usual.alpha) == (1.0, 0.5)
    assert effects["text quality counts twice"].quality >= usual.quality
    assert effects["diversity does not count"].gamma == 0
    alone = effects["the margin alone counts"]
    assert alone.margin == pytest.approx(max(point.margin for point in effects.values()))
    assert isinstance(alone, Point)


def test_jaccard_by_hand() -> None:
    assert jaccard(np.array([1, 2, 3]), np.array([3, 4])) == 0.25
    assert jaccard(np.array([1]), np.array([2])) == 0
    assert jaccard(np.array([2, 1]), np.array([1, 2])) == 1


def test_lists_are_written_with_commas(folder: Path) -> None:
    given = ["methods=greedy,random", "sizes=0.1%,40", "alphas=0, 1e-1", "gammas=3"]
    read = load_config(SweepConfig, None, [f"scores={folder}", *given])
    assert read.methods == ("greedy", "random")
    assert read.sizes == ("0.1%", "40")
    assert read.alphas == (0.0, 0.1)
    assert read.gammas == (3.0,)
    assert load_config(SweepConfig, None, [f"scores={folder}", "sizes=[1%, 5]"]).sizes == (
        "1%",
        "5",
    )


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ("methods=gredy", "should be 'importance'"),
        ("methods=[]", "at least 1 item"),
        ("sizes=many", "the number of pairs is 'many'"),
        ("alphas=0,-1", "weights must not be negative"),
        ("alphas=x", "valid number"),
        ("sizes=200", "of 160 rows, it must be 1..160"),
    ],
)
def test_bad_input_is_one_sentence(folder: Path, given: str, part: str) -> None:
    with pytest.raises(InputError, match=part) as error:
        sweep(load_config(SweepConfig, None, [f"scores={folder}", given]))
    assert "\n" not in str(error.value)


def test_the_command_line_prints_both_tables(folder: Path, tmp_path: Path) -> None:
    arguments = ["--sizes", "5%,50%", "--methods", "greedy", "--alphas", "0", "--grid"]
    more = ["-k", "20", "--out", str(tmp_path / "new"), "--set", "cap=0"]
    result = CliRunner().invoke(app, ["sweep", str(folder), *arguments, *more])
    assert result.exit_code == 0, result.exception
    lines = result.stdout.splitlines()
    assert lines[0] == "# By size, overlap with 'importance'"
    assert lines[2].startswith("greedy\t8\t")
    assert "# By weights, 'importance'" in lines
    assert lines[-1] == str(tmp_path / "new" / "sweep.png")
    settings = json.loads((tmp_path / "new" / "sweep.json").read_text())["settings"]
    assert (settings["cap"], settings["grid"]) == (0, True)
