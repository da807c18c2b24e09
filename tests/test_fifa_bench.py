from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pair_files import write_pairs
from scipy.optimize import minimize_scalar
from scipy.stats import binomtest
from typer.testing import CliRunner

from fifa.bench import Agreement, agreement, bench, read_pairs, share, write_json
from fifa.cli import app
from fifa.config import InputError

# Margins (label's score minus the other's) of 0.9, -0.8, 0.7, 0.6, -0.5, 0.4, -0.3, 0.2, 0.1:
# nine strict pairs, so two a quarter at the ends and 2 + 3 in the middle.
HAND = [
    ("0", 1.9, 1.0),
    ("1", 1.8, 1.0),
    ("1", 1.0, 1.7),
    ("tie", 5.0, 0.0),
    ("0", 1.6, 1.0),
    ("1", 1.5, 1.0),
    ("0", 1.4, 1.0),
    ("0", 1.0, 1.3),
    ("1", 1.0, 1.2),
    ("0", 1.1, 1.0),
]


def rows(
    values: Sequence[tuple[str, Any, Any]], keys: tuple[str, str] = ("score_0", "score_1")
) -> list[dict[str, Any]]:
    """The layout of the public files of scored Pick-a-Pic pairs."""
    return [
        {
            "id": i,
            "caption": f"picture {i}",
            "label": label,
            keys[0]: a,
            keys[1]: b,
            "pred": str(int(i % 2)),
        }
        for i, (label, a, b) in enumerate(values)
    ]


def write(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


def measured(path: Path, values: Sequence[tuple[str, Any, Any]], **more: Any) -> Agreement:
    return agreement(read_pairs(write(path, rows(values, **more))))


def test_by_hand(tmp_path: Path) -> None:
    result = measured(tmp_path / "proxy.json", HAND)
    assert (result.proxy, result.strict, result.ties, result.undecided) == ("proxy", 9, 1, 0)
    assert result.overall.value == pytest.approx(6 / 9)
    # 9 // 4 = 2 at each end: {0.1, 0.2} both right, {0.8, 0.9} one right.
    assert [quarter.agreement.pairs for quarter in result.quarters] == [2, 2, 3, 2]
    assert [q.agreement.value for q in result.quarters] == pytest.approx([1, 1 / 2, 2 / 3, 1 / 2])
    assert (result.smallest, result.largest) == (
        result.quarters[0].agreement,
        result.quarters[3].agreement,
    )
    assert (result.quarters[3].least, result.quarters[3].most) == pytest.approx((0.8, 0.9))
    assert result.set_aside == {}


def test_equal_scores_are_half_right_and_equal_margins_share_a_border(tmp_path: Path) -> None:
    # |margin|: 0, 1, 1, 1, 2: a quarter is one pair. The border of the last three quarters runs
    # through the three ones, of which two are right.
    values = [("0", 1, 1), ("0", 1, 0), ("1", 1, 0), ("1", 0, 1), ("0", 2, 0)]
    for order in (values, values[::-1]):
        result = measured(tmp_path / "p.json", order)
        assert result.undecided == 1
        assert result.overall.value == pytest.approx(3.5 / 5)
        assert [q.agreement.pairs for q in result.quarters] == [1, 1, 2, 1]
        parts = [q.agreement.value for q in result.quarters]
        assert parts == pytest.approx([0.5, 2 / 3, 2 / 3, 1])


def test_probabilities_are_compared_with_what_people_did(tmp_path: Path) -> None:
    values = [("0", 0.9, 0.1), ("1", 0.6, 0.4), ("1", 0.3, 0.7), ("0", 0.8, 0.2)]
    result = measured(tmp_path / "p.json", values, keys=("prob_0", "prob_1"))
    assert [q.expected for q in result.quarters] == pytest.approx([0.6, 0.7, 0.8, 0.9])
    assert [q.agreement.value for q in result.quarters] == [0, 1, 1, 1]


def test_expected_is_the_most_likely_bradley_terry_slope(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    margin = rng.normal(0.4, 1, 200)
    result = measured(tmp_path / "p.json", [("0", float(m), 0.0) for m in margin])

    def surprise(a: float) -> float:
        return float(np.logaddexp(0, -a * margin).sum())

    slope = minimize_scalar(surprise, bracket=(0, 1), tol=1e-10).x
    likely = np.sort(1 / (1 + np.exp(-slope * np.abs(margin)))).reshape(4, 50).mean(1)
    assert [q.expected for q in result.quarters] == pytest.approx(list(likely), rel=1e-6)


def test_a_proxy_that_is_always_right_has_no_slope(tmp_path: Path) -> None:
    result = measured(tmp_path / "p.json", [("0", 2, 1)] * 4)
    assert [q.expected for q in result.quarters] == [None] * 4


def test_the_expectation_of_a_proxy_that_errs_is_below_a_half(tmp_path: Path) -> None:
    result = measured(tmp_path / "p.json", [("0", 1, 2)] * 3 + [("0", 1, 0)])
    assert result.quarters[0].expected == pytest.approx(1 / 4)


@pytest.mark.parametrize(("right", "pairs"), [(0, 5), (7, 9), (40, 40), (319, 425)])
def test_the_interval_is_wilsons(right: int, pairs: int) -> None:
    expected = binomtest(right, pairs).proportion_ci(method="wilson")
    got = share(right, pairs)
    assert (got.low, got.high) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_a_share_of_nothing_is_no_number() -> None:
    assert math.isnan(share(0, 0).value)


def test_rows_that_are_none_are_set_aside_with_a_reason(tmp_path: Path) -> None:
    bad = [
        ("0", "9\nbecause it is better", "8"),
        ("0", None, 1.0),
        ("0", 1.0, float("nan")),
        ("0", True, 1.0),
        ("7", 1.0, 0.0),
        ("0", " 7\n", "5"),  # a number written as text is a number
    ]
    path = write(tmp_path / "p.json", [*rows(bad), "no row", {"score_0": 1, "score_1": 0}])
    pairs = read_pairs(path)
    assert pairs.first.tolist() == [7.0]
    assert pairs.set_aside == {
        "score_0 is not a finite number": 3,
        "score_1 is not a finite number": 1,
        "the label is not 0, 1 or tie": 2,
        "not an object": 1,
    }
    assert pairs.examples[0] == "row 0: score_0 is not a finite number"


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("{", "is not a JSON file"),
        ("[]", "must be a JSON list"),
        ('{"a": 1}', "must be a JSON list"),
        ('[{"label": "0"}]', "no row has score_0 and score_1"),
        ('[{"label": "tie", "score_0": 1, "score_1": 2}]', "holds no strict pair"),
    ],
)
def test_a_file_of_something_else_is_one_sentence(tmp_path: Path, content: str, part: str) -> None:
    (tmp_path / "p.json").write_text(content)
    with pytest.raises(InputError, match=part):
        bench([tmp_path])


def test_a_place_without_pairs_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no scored pairs"):
        bench([tmp_path])
    with pytest.raises(InputError, match="does not exist"):
        bench([tmp_path / "none"])
    (tmp_path / "scores.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match="is no table of `fifa score`"):
        bench([tmp_path])


def test_a_scores_table_gives_the_same_as_its_json(tmp_path: Path) -> None:
    by_json = measured(tmp_path / "p.json", HAND)
    win = {"0": 0, "1": 1, "tie": -1}
    table = {
        "reward_0": pa.array([*(a for _, a, _ in HAND), None], pa.float64()),
        "reward_1": pa.array([*(b for _, _, b in HAND), 1.0], pa.float64()),
        "win": pa.array([*(win[label] for label, _, _ in HAND), 0], pa.int8()),
    }
    folder = tmp_path / "scores"
    folder.mkdir()
    pq.write_table(pa.table(table), folder / "scores.parquet")
    (by_table,) = bench([folder])
    assert by_table.proxy == "scores"
    assert (by_table.overall, by_table.quarters) == (by_json.overall, by_json.quarters)
    assert by_table.set_aside == {"a reward or the winner is missing": 1}


def test_what_fifa_score_writes_is_read_with_the_name_of_its_proxy(tmp_path: Path) -> None:
    from fifa.scoring import ScoreConfig, score

    data, out = write_pairs(tmp_path / "a.parquet"), tmp_path / "scores"
    summary = score(ScoreConfig(data=data, out=out, reward="jpeg_incompressibility"))
    (result,) = bench([out])
    assert result.proxy == "jpeg_incompressibility"
    assert (result.strict, result.ties) == (summary.scored - summary.ties, summary.ties)
    assert result.overall.value == pytest.approx(summary.agreement)


def test_the_command_prints_a_table_and_writes_json(tmp_path: Path) -> None:
    write(tmp_path / "good.json", rows(HAND))
    write(tmp_path / "sure.json", rows([("0", 2, 1), ("0", "no", 1)]))
    out = tmp_path / "out" / "bench.json"
    result = CliRunner().invoke(app, ["bench", str(tmp_path), "--json", str(out)])
    assert result.exit_code == 0, result.exception
    lines = result.output.splitlines()
    assert lines[2].split("\t")[:5] == ["good", "9", "1", "0", "0.667 [0.354, 0.879]"]
    assert lines[3].split("\t")[4:] == ["1.000 [0.207, 1.000]", "-", "-"]
    assert lines[-2] == "sure: set aside, 1 rows: score_0 is not a finite number"
    assert lines[-1] == str(out)
    told = json.loads(out.read_text())["proxies"]
    assert told[0]["overall"]["value"] == pytest.approx(6 / 9)
    assert told[1]["quarters"][0]["agreement"]["value"] is None


def test_json_is_whole_or_absent(tmp_path: Path) -> None:
    result = measured(tmp_path / "p.json", HAND)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        write_json(tmp_path / "file" / "out.json", [result])
