from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow.parquet as pq
import pytest
from pair_files import columns, write_pairs

from fifa.config import InputError
from fifa.filtering import Method, SelectConfig, SelectSummary, select
from fifa.scoring import ScoreConfig, score
from fifa.selection import SELECTORS


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scores of 60 rows: 15 ties, 6 repeated prompts, two poor prompts, one unreadable image."""
    folder = tmp_path_factory.mktemp("scored")
    clean = columns(60)
    clean["caption"][5], clean["caption"][6] = "zxqv wrtplk qgfd", "https://example.com/cat.png"
    clean["jpg_0"][8] = b"no image"
    data = write_pairs(folder / "a.parquet", 60, **clean)
    score(ScoreConfig(data=data, out=folder / "scores", reward="jpeg_incompressibility"))
    return folder


def keep(scored: Path, out: Path, **options: Any) -> tuple[SelectSummary, list[int]]:
    """Run a selection; the summary and the kept rows, found by their hidden number."""
    summary = select(SelectConfig(scores=scored / "scores", out=out, **options))
    kept = pq.read_table(out / "kept.parquet")["truth_utility_0"].to_pylist()
    return summary, [int(i) for i in kept]


def scores(scored: Path) -> dict[str, list[Any]]:
    return pq.read_table(scored / "scores" / "scores.parquet").to_pydict()


def test_the_kept_rows_are_those_of_the_source_with_all_columns(
    scored: Path, tmp_path: Path
) -> None:
    summary, rows = keep(scored, tmp_path, k=12)
    source = pq.read_table(scored / "a.parquet")
    assert pq.read_table(tmp_path / "kept.parquet").equals(source.take(rows))
    assert summary.kept == len(rows) == 12
    assert rows == sorted(rows)


def test_margin_alone_keeps_the_largest_margins(scored: Path, tmp_path: Path) -> None:
    _, rows = keep(scored, tmp_path, k="20%", method="margin", cap=0)
    table = scores(scored)
    margin = {r: m for r, m in zip(table["row"], table["margin"], strict=True) if m is not None}
    assert len(rows) == 12
    assert min(margin[r] for r in rows) >= max(margin[r] for r in margin if r not in rows)


def test_importance_adds_three_scaled_columns(scored: Path, tmp_path: Path) -> None:
    keep(scored, tmp_path, k=5, alpha=2.0, gamma=0.25, min_quality=0.5)
    table = scores(scored)
    eligible = [i for i, m in enumerate(table["margin"]) if m is not None]
    eligible = [i for i in eligible if table["quality"][i] >= 0.5]
    total = np.zeros(len(eligible))
    for name, weight in (("margin", 1.0), ("quality", 2.0), ("log_knn", 0.25)):
        x = np.array([table[name][i] for i in eligible])
        total += weight * (x - x.mean()) / x.std()
    got = pq.read_table(tmp_path / "selection.parquet").to_pydict()
    for i, value in zip(eligible, total, strict=True):
        assert got["importance"][table["row"][i]] == pytest.approx(value, abs=1e-4)
    assert sum(v is not None for v in got["importance"]) == len(eligible)


def test_every_row_has_one_fate_and_the_first_reason_counts(scored: Path, tmp_path: Path) -> None:
    summary, rows = keep(scored, tmp_path, k=12, min_quality=6.0)
    fates = pq.read_table(tmp_path / "selection.parquet")["fate"].to_pylist()
    assert len(fates) == 60
    assert Counter(fates) == summary.fates
    assert [i for i, fate in enumerate(fates) if fate == "kept"] == rows
    assert fates[8] == "could not be scored"
    assert fates[5] == fates[6] == "text below the minimum"
    assert [i for i, fate in enumerate(fates) if fate == "tie"] == list(range(3, 60, 4))


@pytest.mark.parametrize("method", ["importance", "greedy", "random", "pair_ranking"])
def test_ties_and_bad_rows_are_never_kept(scored: Path, tmp_path: Path, method: str) -> None:
    summary, rows = keep(scored, tmp_path, k="100%", method=method, cap=0)
    assert rows == [i for i in range(60) if i % 4 != 3 and i != 8]
    assert (summary.wanted, summary.kept) == (60, 44)


def test_the_cap_limits_each_prompt_and_says_so(scored: Path, tmp_path: Path) -> None:
    summary, rows = keep(scored, tmp_path, k="100%", cap=1)
    table = scores(scored)
    prompt = dict(zip(table["row"], table["prompt_id"], strict=True))
    assert len({prompt[r] for r in rows}) == len(rows)
    assert summary.fates["its prompt has its share"] == 44 - len(rows) > 0


def test_the_report_of_f_is_that_of_the_kept_rows(scored: Path, tmp_path: Path) -> None:
    summary, rows = keep(scored, tmp_path, k=10, method="greedy", alpha=0.0, gamma=0.0, cap=0)
    table = scores(scored)
    margin = {r: m for r, m in zip(table["row"], table["margin"], strict=True) if m is not None}
    every = np.array(list(margin.values()))
    scaled = (np.array([margin[r] for r in rows]) - every.mean()) / every.std()
    f = summary.f["greedy"]
    assert f == pytest.approx(scaled.mean(), rel=1e-4)
    assert f == summary.f["margin"]  # with no other term, greedy is margin alone
    told = json.loads((tmp_path / "selection.json").read_text())
    assert told["objective"]["greedy"]["f"] == f
    assert told["settings"]["alpha"] == 0.0
    assert f >= (summary.f["random"] or 0.0)


def test_selecting_twice_gives_the_same_bytes_and_another_seed_other_rows(
    scored: Path, tmp_path: Path
) -> None:
    _, first = keep(scored, tmp_path / "1", k=10, method="random", seed=1)
    keep(scored, tmp_path / "2", k=10, method="random", seed=1)
    _, other = keep(scored, tmp_path / "3", k=10, method="random", seed=2)
    assert first != other
    for name in ("kept.parquet", "selection.parquet"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_one_pair_has_no_entropy_and_the_file_says_null(scored: Path, tmp_path: Path) -> None:
    summary, rows = keep(scored, tmp_path, k=1)
    assert len(rows) == 1
    assert summary.f["importance"] is None
    assert json.loads((tmp_path / "selection.json").read_text())["kept"] == 1


def test_a_data_set_that_changed_since_is_refused(scored: Path, tmp_path: Path) -> None:
    data = write_pairs(tmp_path / "a.parquet", 12)
    out = tmp_path / "scores"
    score(ScoreConfig(data=data, out=out, reward="jpeg_compressibility"))
    write_pairs(data, 12, caption=["new"] * 12)
    with pytest.raises(InputError, match="has changed since"):
        select(SelectConfig(scores=out))
    data.unlink()
    with pytest.raises(InputError, match="does not exist"):
        select(SelectConfig(scores=out))
    moved = write_pairs(tmp_path / "moved" / "a.parquet", 12)
    assert select(SelectConfig(scores=out, data=moved)).kept == 1


def test_without_complete_scores_there_is_nothing_to_select(scored: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no scores"):
        select(SelectConfig(scores=tmp_path))
    manifest = json.loads((scored / "scores" / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "complete": False}))
    with pytest.raises(InputError, match="not complete"):
        select(SelectConfig(scores=tmp_path))


def test_a_filter_that_leaves_nothing_says_why(scored: Path, tmp_path: Path) -> None:
    data = write_pairs(tmp_path / "a.parquet", 3, label_0=[0.5] * 3, label_1=[0.5] * 3)
    score(ScoreConfig(data=data, out=tmp_path / "s", reward="jpeg_compressibility"))
    with pytest.raises(InputError, match="can be kept; 3 rows: tie"):
        select(SelectConfig(scores=tmp_path / "s"))


def test_the_deny_list_has_its_own_fate(scored: Path, tmp_path: Path) -> None:
    captions = pq.read_table(scored / "a.parquet")["caption"].to_pylist()
    denied = captions[0]
    (tmp_path / "deny.txt").write_text(f"# by hand\n{denied.upper()}\n/^zxqv/\n")
    summary, rows = keep(scored, tmp_path, k="100%", cap=0, deny=tmp_path / "deny.txt")
    fates = pq.read_table(tmp_path / "selection.parquet")["fate"].to_pylist()
    ties = range(3, 60, 4)
    same = [i for i, caption in enumerate(captions) if denied.lower() in caption.lower()]
    expected = [i for i in (*same, 5) if i not in ties and i != 8]
    assert [i for i, fate in enumerate(fates) if fate == "on the deny list"] == sorted(expected)
    assert summary.fates["on the deny list"] == len(expected) > 1
    assert not set(rows) & set(expected)
    with pytest.raises(InputError, match="cannot read the deny list"):
        select(SelectConfig(scores=scored / "scores", deny=tmp_path / "absent.txt"))


def test_near_copies_share_a_cap(scored: Path, tmp_path: Path) -> None:
    table = scores(scored)
    vectors = np.load(next((scored / "scores").glob("embeddings-*.npy"))).astype(np.float64)
    prompt = dict(zip(table["row"], table["prompt_id"], strict=True))
    _, apart = keep(scored, tmp_path / "1", k="100%", cap=1)
    _, rows = keep(scored, tmp_path / "2", k="100%", cap=1, near=1.0)
    assert 1 < len(rows) < len(apart)
    leaders: list[int] = []  # the rule, prompt by prompt
    leader = []
    for p, z in enumerate(vectors):
        led = next((q for q in leaders if np.linalg.norm(vectors[q] - z) < 1.0), p)
        leaders += [p] if led == p else []
        leader.append(led)
    groups = {leader[prompt[r]] for r in apart}
    assert sorted(leader[prompt[r]] for r in rows) == sorted(groups)


def test_every_method_is_reported_and_what_is_too_dear_is_named(
    scored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(scored, tmp_path, k=10)
    told = json.loads((tmp_path / "selection.json").read_text())
    assert set(told["objective"]) == set(SELECTORS) == set(get_args(Method))
    assert told["not_compared"] == {}
    monkeypatch.setattr("fifa.selection.BUDGET", 1e4)
    keep(scored, tmp_path, k=10, method="greedy")
    told = json.loads((tmp_path / "selection.json").read_text())
    assert "greedy" in told["objective"]  # the chosen one always is
    assert "facility_location" in told["not_compared"]
    assert set(told["objective"]) | set(told["not_compared"]) == set(SELECTORS)


@pytest.mark.parametrize("k", ["half", "0%", "-1", 0])
def test_a_wrong_count_is_refused_before_anything_is_read(k: str | int) -> None:
    with pytest.raises(ValueError, match="the number of pairs is"):
        SelectConfig(scores=Path("nowhere"), k=k)
