from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fifa.config import InputError
from fifa.pairs import (
    BadRow,
    Judgment,
    Pair,
    PairTable,
    distinct_prompts,
    held_out,
    judgment_from_row,
    load_pairs,
    normalise_prompt,
    pair_from,
    to_pairs,
)

ROW: dict[str, Any] = {
    "caption": "a cat",
    "jpg_0": b"left",
    "jpg_1": b"right",
    "label_0": 1.0,
    "label_1": 0.0,
    "user_id": 7,
}


def write(path: Path, rows: int = 10, rows_a_group: int = 4, **columns: Any) -> pa.Table:
    table = pa.table(
        {
            "caption": [f"prompt {i}" for i in range(rows)],
            "jpg_0": [b"a%d" % i for i in range(rows)],
            "jpg_1": [b"b%d" % i for i in range(rows)],
            "label_0": pa.array([(1.0, 0.0, 0.5)[i % 3] for i in range(rows)], pa.float32()),
            "label_1": pa.array([(0.0, 1.0, 0.5)[i % 3] for i in range(rows)], pa.float32()),
            "truth_utility": [float(i) for i in range(rows)],
            **columns,
        }
    ).replace_schema_metadata({"huggingface": "{}"})
    pq.write_table(table, path, row_group_size=rows_a_group)
    return table


@pytest.mark.parametrize(
    ("label_0", "label_1", "outcome"), [(1, 0, "a"), (0.0, 1.0, "b"), (0.5, 0.5, "tie")]
)
def test_a_row_becomes_a_judgment(label_0: float, label_1: float, outcome: str) -> None:
    judgment = judgment_from_row({**ROW, "label_0": label_0, "label_1": label_1}, "f row 0")
    assert judgment.outcome == outcome
    assert (judgment.image_a, judgment.image_b) == (b"left", b"right")
    assert (judgment.who, judgment.when, judgment.where) == ("7", "", "f row 0")


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"caption": None}, "caption"),
        ({"caption": " \n"}, "caption"),
        ({"jpg_1": None}, "an image is missing or empty .jpg_1"),
        ({"jpg_0": b""}, "jpg_0"),
        ({"label_0": 1, "label_1": 1}, "label"),
        ({"label_0": None}, "label"),
        ({"label_0": float("nan")}, "label"),
        ({"label_0": 0.7, "label_1": 0.3}, "label"),
        ({"has_label": False}, "label"),
    ],
)
def test_a_bad_row_says_where_and_what(change: dict[str, Any], part: str) -> None:
    with pytest.raises(InputError, match=f"^f row 3: .*{part}"):
        judgment_from_row({**ROW, **change}, "f row 3")


def judgment(outcome: Any, image_a: bytes = b"A", image_b: bytes = b"B") -> Judgment:
    return Judgment("p", image_a, image_b, outcome, where="here")


def test_the_winner_wins_and_a_tie_makes_no_pair() -> None:
    assert pair_from(judgment("a")) == Pair("p", b"A", b"B", 1.0, "here")
    assert pair_from(judgment("b")) == Pair("p", b"B", b"A", 1.0, "here")
    assert pair_from(judgment("tie")) is None


def test_what_is_dropped_is_counted() -> None:
    pairs, dropped = to_pairs([judgment("tie"), judgment("a"), judgment("b", b"X", b"X")])
    assert [pair.win for pair in pairs] == [b"A"]
    assert dropped == Counter({"tie": 1, "same picture twice": 1})


def test_a_table_is_all_files_of_a_folder_in_order(tmp_path: Path) -> None:
    write(tmp_path / "b.parquet", rows=3)
    write(tmp_path / "a.parquet", rows=10)
    (tmp_path / ".tmp-1-c.parquet").write_bytes(b"left over")
    table = PairTable.open(tmp_path)
    assert table.num_rows == 13
    groups = [(g.path.name, g.index, g.start, g.rows) for g in table.row_groups()]
    assert groups == [
        ("a.parquet", 0, 0, 4),
        ("a.parquet", 1, 4, 4),
        ("a.parquet", 2, 8, 2),
        ("b.parquet", 0, 10, 3),
    ]
    assert table.read_group(1, ["caption"])["caption"].to_pylist()[0] == "prompt 4"


def test_hidden_truth_is_never_read(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet")
    table = PairTable.open(tmp_path / "a.parquet")
    assert "truth_utility" not in table.read_group(0).column_names
    with pytest.raises(InputError, match="no column 'truth_utility'"):
        table.read_group(0, ["truth_utility"])


def test_bad_rows_come_in_their_place(tmp_path: Path) -> None:
    captions = [f"p{i}" if i != 5 else "" for i in range(10)]
    write(tmp_path / "a.parquet", caption=captions)
    table = PairTable.open(tmp_path / "a.parquet")
    rows = list(table.judgments(1))
    assert rows[1] == BadRow(
        5, "the caption is missing or empty", "row 5 (a.parquet): the caption is missing or empty"
    )
    assert isinstance(rows[0], Judgment)
    assert rows[0].where == "row 4 (a.parquet)"
    pairs, dropped = load_pairs(tmp_path / "a.parquet")
    assert [pair.win for pair in pairs[:3]] == [b"a0", b"b1", b"a3"]
    assert len(pairs) == 7
    assert dropped == Counter({"tie": 2, "bad row": 1})  # row 5 would have been a tie


def test_take_keeps_columns_types_metadata_and_order(tmp_path: Path) -> None:
    source = write(tmp_path / "a.parquet")
    out = tmp_path / "new" / "kept.parquet"
    PairTable.open(tmp_path / "a.parquet").take([9, 0, 5, 4], out)
    assert pq.read_table(out).equals(source.take([0, 4, 5, 9]), check_metadata=True)
    assert PairTable.open(out).num_rows == 4


def test_categories_and_views_are_read_as_text(tmp_path: Path) -> None:
    """As pandas and polars write them; the numbers of categories may differ in size by file."""
    source = write(tmp_path / "plain.parquet")
    expected, _ = load_pairs(tmp_path / "plain.parquet")
    (tmp_path / "t").mkdir()
    for name, size in (("a", pa.int8()), ("b", pa.int32())):
        numbers = pa.array(range(10), size)
        words = pa.DictionaryArray.from_arrays(numbers, source["caption"].combine_chunks())
        write(tmp_path / "t" / f"{name}.parquet", caption=words, model_0=words)
    pictures = {name: source[name].cast(pa.binary_view()) for name in ("jpg_0", "jpg_1")}
    write(tmp_path / "v.parquet", caption=source["caption"].cast(pa.string_view()), **pictures)
    for path, files in ((tmp_path / "t", 2), (tmp_path / "v.parquet", 1)):
        table = PairTable.open(path)
        assert table.captions([9, 0]) == ["prompt 0", "prompt 9"]
        table.take(range(10 * files), tmp_path / "kept.parquet")
        for each in (path, tmp_path / "kept.parquet"):
            won = [(pair.prompt, pair.win, pair.lose) for pair in load_pairs(each)[0]]
            assert won == [(pair.prompt, pair.win, pair.lose) for pair in expected] * files


def test_take_merges_small_pieces_into_full_row_groups(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", rows=2500, rows_a_group=10)
    PairTable.open(tmp_path / "a.parquet").take(range(0, 2500, 2), tmp_path / "kept.parquet")
    assert [g.rows for g in PairTable.open(tmp_path / "kept.parquet").row_groups()] == [1000, 250]


def test_read_rows_goes_across_groups_without_the_hidden_columns(tmp_path: Path) -> None:
    source = write(tmp_path / "a.parquet")
    table = PairTable.open(tmp_path / "a.parquet")
    assert table.read_rows([9, 2, 4]).equals(source.take([2, 4, 9]).drop(["truth_utility"]))
    assert table.read_rows([], ["caption"]).num_rows == 0


@pytest.mark.parametrize(("rows", "part"), [([10], "rows 0..9"), ([-1], "rows"), ([3, 3], "twice")])
def test_take_refuses_rows_that_are_not_there(tmp_path: Path, rows: list[int], part: str) -> None:
    write(tmp_path / "a.parquet")
    with pytest.raises(InputError, match=part):
        PairTable.open(tmp_path / "a.parquet").take(rows, tmp_path / "kept.parquet")
    assert [p.name for p in tmp_path.iterdir()] == ["a.parquet"]


def test_a_full_disk_while_taking_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", rows=3000, jpg_0=[os.urandom(50) for _ in range(3000)])
    program = (
        "import resource, sys\n"
        "from fifa.config import InputError\n"
        "from fifa.pairs import PairTable\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))\n"
        "try:\n"
        "    PairTable.open(sys.argv[1]).take(range(3000), sys.argv[2])\n"
        "except InputError as error:\n"
        "    print(error)\n"
    )
    out = tmp_path / "out" / "kept.parquet"
    run = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "a.parquet"), str(out)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.startswith(f"cannot write {out}: ")
    assert "File too large" in run.stdout
    assert run.stdout.count("\n") == 1
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize("what", ["missing", "no files", "no parquet", "truncated", "empty"])
def test_what_is_no_table_is_one_sentence(tmp_path: Path, what: str) -> None:
    path = tmp_path / "a.parquet"
    if what == "no files":
        path.mkdir()
    elif what == "no parquet":
        path.write_text("hello, this is text")
    elif what == "truncated":
        write(path)
        path.write_bytes(path.read_bytes()[:-20])
    elif what == "empty":
        write(path, rows=0)
    with pytest.raises(InputError) as caught:
        PairTable.open(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_damaged_row_group_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write(path)
    data = bytearray(path.read_bytes())
    data[4:200] = bytes(196)
    path.write_bytes(bytes(data))
    with pytest.raises(InputError, match=r"cannot read .*a\.parquet"):
        PairTable.open(path).read_group(0)


def test_wrong_columns_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(write(path).rename_columns(["Caption", *ROW_NAMES[1:]]), path)
    with pytest.raises(InputError, match=r"no column 'caption'; is it 'Caption'\?"):
        PairTable.open(path)
    write(path, jpg_1=["text"] * 10)
    with pytest.raises(InputError, match="column 'jpg_1' is string, it must be bytes"):
        PairTable.open(path)
    write(path, jpg_1=[{"bytes": b"x", "path": "x.png"}] * 10)
    with pytest.raises(
        InputError, match=r"must be bytes; `fifa convert pickapic .*a\.parquet --out"
    ):
        PairTable.open(path)


ROW_NAMES = ["caption", "jpg_0", "jpg_1", "label_0", "label_1", "truth_utility"]


def test_files_with_different_columns_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet")
    write(tmp_path / "b.parquet", model_0=["m"] * 10)
    with pytest.raises(InputError, match=r"b\.parquet: its columns differ"):
        PairTable.open(tmp_path)


def test_the_fingerprint_follows_the_rows_not_the_place(tmp_path: Path) -> None:
    labels = [1.0, 0.0] * 5
    other = [0.0, 1.0] * 5  # same smallest, same largest, same size
    prints = []
    for folder, label in (("x", labels), ("y", labels), ("z", other)):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "a.parquet", label_0=label)
        prints.append(PairTable.open(tmp_path / folder).fingerprint())
    assert prints[0] == prints[1] != prints[2]


def test_normalise_prompt_by_example() -> None:
    assert normalise_prompt("  A　Red\tCAT!. ") == "a red cat"
    assert normalise_prompt("Straße ﬁ") == "strasse fi"
    assert normalise_prompt("a\u200bb") == "ab"
    assert normalise_prompt("a, b") == "a, b"


def test_distinct_prompts_are_numbered_as_they_appear() -> None:
    first, ids = distinct_prompts(["A cat.", "a dog", "a  CAT", "A dog!", "cats"])
    assert first == ["A cat.", "a dog", "cats"]
    assert ids.tolist() == [0, 1, 0, 1, 2]


@given(st.text())
def test_normalise_prompt_twice_changes_nothing(text: str) -> None:
    once = normalise_prompt(text)
    assert normalise_prompt(once) == once


def test_held_out_is_a_stable_nested_share_of_the_prompts() -> None:
    prompts = [f"prompt number {i}" for i in range(4000)]
    tenth = {p for p in prompts if held_out(p, 0.1, seed=0)}
    third = {p for p in prompts if held_out(p, 0.3, seed=0)}
    assert tenth < third
    assert 320 < len(tenth) < 480  # 4 standard deviations
    assert tenth != {p for p in prompts if held_out(p, 0.1, seed=1)}
    assert all(held_out(p.upper() + ".", 0.1, 0) for p in tenth)
    assert not any(held_out(p, 0.0, 0) for p in prompts)
    assert all(held_out(p, 1.0, 0) for p in prompts)
    with pytest.raises(InputError, match=r"\[0, 1\]"):
        held_out("p", 1.5, 0)


def test_what_is_no_pair_table_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match=r"pairs\.jsonl is no Parquet file; `fifa convert` makes"):
        PairTable.open(tmp_path / "pairs.jsonl")
    pq.write_table(pa.table({"row": [0], "log_knn": [0.5]}), tmp_path / "scores.parquet")
    with pytest.raises(InputError, match=r"it holds scores; the pairs are in kept\.parquet"):
        PairTable.open(tmp_path)
