"""Every reader on real files made here, through the table that `convert` writes."""

from __future__ import annotations

import base64
import csv
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fifa.config import InputError
from fifa.pairs import BadRow, Judgment, PairTable
from fifa.sources import SOURCES, described, load_source
from fifa.sources.columns import hub_rows
from fifa.sources.convert import REJECTED, ConvertConfig, convert
from fifa.sources.reading import ReadOptions, grouped, json_items


def image(seed: int, kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=kind)
    return buffer.getvalue()


def put(folder: Path, *names: str) -> dict[str, bytes]:
    """Write a different picture under each name; the bytes by name."""
    written = {}
    for seed, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        written[name] = image(seed, "JPEG" if name.endswith("jpg") else "PNG")
        path.write_bytes(written[name])
    return written


def converted(tmp_path: Path, source: str, path: Path | str, **options: Any) -> list[Judgment]:
    """What PairTable reads back from the converted source."""
    out = tmp_path / "converted"
    convert(ConvertConfig(source=source, path=str(path), out=out, **options))
    table = PairTable.open(out)
    rows = [row for i in range(len(table.row_groups())) for row in table.judgments(i)]
    assert not any(isinstance(row, BadRow) for row in rows)
    return [row for row in rows if isinstance(row, Judgment)]


def rejected(tmp_path: Path) -> list[dict[str, Any]]:
    lines = (tmp_path / "converted" / REJECTED).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def kinds(tmp_path: Path) -> list[str]:
    return [row["kind"] for row in rejected(tmp_path)]


def verdicts(rows: list[Judgment], names: dict[str, bytes]) -> list[tuple[str, str, str, str]]:
    """(prompt, name of image a, name of image b, outcome) of each row."""
    by_bytes = {data: name for name, data in names.items()}
    return [(r.prompt, by_bytes[r.image_a], by_bytes[r.image_b], r.outcome) for r in rows]


# --- the table of kinds ---------------------------------------------------------------------------


def test_every_kind_loads_and_says_what_it_is_in_a_line() -> None:
    told = dict(described())
    assert list(told) == list(SOURCES)
    assert all(line.endswith((".", "...")) and len(line) < 100 for line in told.values())
    assert load_source("fifa.sources.records:jsonl") is load_source("jsonl")


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        ("jsnol", "did you mean 'jsonl'"),
        ("nowhere.at:all", "cannot be loaded: No module named"),
        ("json:nothing", "cannot be loaded"),
        ("json:__name__", "is no reader"),
    ],
)
def test_an_unknown_kind_is_one_sentence(kind: str, part: str) -> None:
    with pytest.raises(InputError, match=part):
        load_source(kind)


@pytest.mark.parametrize("kind", SOURCES)
def test_a_path_that_is_not_there_is_one_sentence_and_leaves_nothing(
    kind: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"nothing-here does not exist \(expected"):
        converted(tmp_path, kind, tmp_path / "nothing-here")
    assert list(tmp_path.iterdir()) == []


# --- Parquet and the Hub --------------------------------------------------------------------------


def pickapic_columns() -> dict[str, Any]:
    pictures: list[bytes | None] = [image(i, "JPEG") for i in range(12)]
    return {
        "caption": ["a cat", "a dog", "a bird", "none", "", "wrong"],
        "jpg_0": [*pictures[:3], None, *pictures[4:6]],
        "jpg_1": pictures[6:],
        "label_0": [1.0, 0.0, 0.5, 1.0, 1.0, 7.0],
        "label_1": [0.0, 1.0, 0.5, 0.0, 0.0, 0.0],
        "model_0": ["sd15"] * 6,
        "model_1": ["sdxl"] * 6,
        "user_id": [3, 4, 5, 6, 7, 8],
        "has_label": [True] * 6,
    }


def test_pickapic_passes_usable_rows_byte_for_byte(tmp_path: Path) -> None:
    columns = pickapic_columns()
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    rows = converted(tmp_path, "pickapic", tmp_path / "a.parquet")
    assert [row.outcome for row in rows] == ["a", "b", "tie"]
    assert [(r.prompt, r.who, r.model_a, r.model_b) for r in rows][:2] == [
        ("a cat", "3", "sd15", "sdxl"),
        ("a dog", "4", "sd15", "sdxl"),
    ]
    assert [row.image_a for row in rows] == columns["jpg_0"][:3]
    assert [row.image_b for row in rows] == columns["jpg_1"][:3]
    assert kinds(tmp_path) == [
        "an image is missing or empty",
        "the caption is missing or empty",
        "the label is missing or wrong",
    ]


def test_pickapic_without_a_label_or_as_a_hub_image_column(tmp_path: Path) -> None:
    columns = pickapic_columns()
    columns["has_label"] = [False, True, None, True, True, True]
    for side in ("jpg_0", "jpg_1"):
        columns[side] = [{"bytes": data, "path": None} for data in columns[side]]
    folder = tmp_path / "clone" / "data"
    folder.mkdir(parents=True)
    pq.write_table(pa.table(columns), folder / "train-00000-of-00001.parquet")
    pq.write_table(pa.table(columns), folder / "test-00000-of-00001.parquet")
    rows = converted(tmp_path, "pickapic", tmp_path / "clone")
    assert [row.prompt for row in rows] == ["a dog", "a bird"]
    assert {row["reason"].split(" row")[0] for row in rejected(tmp_path)} == {
        "data/train-00000-of-00001.parquet"
    }


def test_pickapic_without_pictures_names_the_column(tmp_path: Path) -> None:
    columns = pickapic_columns()
    del columns["jpg_1"]
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(InputError, match="no column 'jpg_1'; is it 'jpg_0'"):
        converted(tmp_path, "pickapic", tmp_path / "a.parquet")


def test_a_damaged_parquet_file_is_set_aside_and_the_next_one_read(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    pq.write_table(pa.table(pickapic_columns()), folder / "b.parquet")
    (folder / "a.parquet").write_bytes((folder / "b.parquet").read_bytes()[:-30])
    assert len(converted(tmp_path, "pickapic", folder)) == 3
    assert kinds(tmp_path)[0] == "a file cannot be read"


def test_the_hub_is_streamed_by_the_datasets_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    columns = pickapic_columns()
    pq.write_table(pa.table(columns), tmp_path / "train-00000-of-00001.parquet")
    needed = ("caption", "jpg_0", "jpg_1", "label_0", "label_1")
    rows = list(hub_rows(str(tmp_path), ReadOptions(), needed, ("user_id", "absent")))
    found = [row for _, row in rows if isinstance(row, dict)]
    assert [row["caption"] for row in found] == columns["caption"]
    assert [row["jpg_0"] for row in found] == columns["jpg_0"]
    assert set(found[0]) == {*needed, "user_id"}
    with pytest.raises(InputError, match=r"cannot read '.*' from the Hub at row 0: .*valid"):
        list(hub_rows(str(tmp_path), ReadOptions(split="valid"), needed, ()))
    with pytest.raises(InputError, match="no column 'prompt'"):
        list(hub_rows(str(tmp_path), ReadOptions(), ("prompt",), ()))


def test_without_the_datasets_library_the_hub_says_what_to_install(tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules['datasets'] = None\n"
        "from fifa.sources import load_source\n"
        "from fifa.sources.reading import ReadOptions\n"
        "try:\n"
        "    next(load_source('pickapic')('owner/name', ReadOptions()))\n"
        "except ValueError as error:\n"
        "    print(error)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert "needs the package datasets: pip install 'd3po-fifa[hub]'" in run.stdout


def test_open_image_preferences(tmp_path: Path) -> None:
    win, lose = image(1), image(2)
    columns = {
        "prompt": ["a cat", None],
        "chosen": [{"bytes": win, "path": "1.png"}] * 2,
        "rejected": [{"bytes": lose, "path": "2.png"}] * 2,
        "chosen_model": ["flux", "flux"],
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    (row,) = converted(tmp_path, "open-image-preferences", tmp_path / "a.parquet")
    assert (row.prompt, row.image_a, row.image_b, row.outcome) == ("a cat", win, lose, "a")
    assert row.model_a == "flux"
    assert kinds(tmp_path) == ["the prompt is missing or no text"]


# --- rankings -------------------------------------------------------------------------------------


def write_json(path: Path, value: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def test_hpdv2_rankings_become_all_pairs(tmp_path: Path) -> None:
    pictures = put(tmp_path / "img", "a.jpg", "b.jpg", "c.jpg")
    records = [
        {"prompt": "ranks", "image_path": ["test/a.jpg", "b.jpg", "c.jpg"], "rank": [2, 1, 2]},
        {"prompt": "people", "file_path": ["a.jpg", "b.jpg"], "human_preference": [0, 1]},
        {"prompt": "one gone", "image_path": ["a.jpg", "z.jpg", "c.jpg"], "rank": [1, 2, 3]},
        {"prompt": "short", "image_path": ["a.jpg"], "rank": [1, 2]},
        {"prompt": "no", "image_path": ["a.jpg", "b.jpg"], "rank": [1, "x"]},
        {"prompt": "none", "image_path": ["a.jpg", "b.jpg"]},
        7,
    ]
    path = write_json(tmp_path / "test.json", records)
    rows = converted(tmp_path, "hpdv2", path, images=tmp_path / "img")
    assert verdicts(rows, pictures) == [
        ("ranks", "a.jpg", "b.jpg", "b"),
        ("ranks", "a.jpg", "c.jpg", "tie"),
        ("ranks", "b.jpg", "c.jpg", "a"),
        ("people", "a.jpg", "b.jpg", "b"),
        ("one gone", "a.jpg", "c.jpg", "a"),
    ]
    assert kinds(tmp_path) == [
        "a picture file is missing",
        "pictures and ranks differ in number",
        "the rank is no number",
        "a record holds no ranking",
        "a record is no JSON object",
    ]


def test_ties_can_be_dropped_and_are_counted(tmp_path: Path) -> None:
    put(tmp_path, "a.png", "b.png", "c.png")
    record = {"prompt": "p", "image_path": ["a.png", "b.png", "c.png"], "rank": [1, 1, 2]}
    path = write_json(tmp_path / "test.json", [record])
    rows = converted(tmp_path, "hpdv2", path, ties="drop")
    assert [row.outcome for row in rows] == ["a", "a"]
    assert kinds(tmp_path) == ["a tie, and ties are dropped"]


def test_imagereward_in_both_of_its_shapes(tmp_path: Path) -> None:
    root = tmp_path / "db"
    pictures = put(root, "train_1/x.webp", "train_1/y.webp", "train_1/z.webp")
    whole = {
        "prompt": "whole",
        "generations": ["train_1/x.webp", "train_1/y.webp"],
        "ranking": [2, 1],
    }
    write_json(root / "all.json", [whole])
    parts = [
        {"prompt_id": "1", "prompt": "p one", "image_path": "images/train_1/x.webp", "rank": 1},
        {"prompt_id": "2", "prompt": "p two", "image_path": "images/train_1/y.webp", "rank": 2},
        {"prompt_id": "1", "prompt": "p one", "image_path": "images/train_1/z.webp", "rank": 3},
        {"prompt_id": "2", "prompt": "p two", "image_path": "images/train_1/z.webp", "rank": 2},
        {"prompt_id": "3", "prompt": "lonely", "image_path": "images/train_1/z.webp", "rank": 1},
    ]
    write_json(root / "train_1" / "train_1.json", parts)
    rows = converted(tmp_path, "imagereward", root)
    assert verdicts(rows, pictures) == [
        ("whole", "train_1/x.webp", "train_1/y.webp", "b"),
        ("p one", "train_1/x.webp", "train_1/z.webp", "a"),
        ("p two", "train_1/y.webp", "train_1/z.webp", "tie"),
    ]
    assert kinds(tmp_path) == ["a ranking needs at least two pictures"]


@pytest.mark.parametrize("nobody", [None, float("nan"), ""])
def test_imagereward_rows_without_an_id_belong_to_their_prompts(
    tmp_path: Path, nobody: object
) -> None:
    pictures = put(tmp_path, "c1.png", "d1.png", "c2.png", "d2.png")
    parts = [
        {"prompt_id": nobody, "prompt": prompt, "image_path": f"{prompt[0]}{n}.png", "rank": n}
        for n in (1, 2)
        for prompt in ("cat", "dog")
    ]
    rows = converted(tmp_path, "imagereward", write_json(tmp_path / "a.json", parts))
    assert verdicts(rows, pictures) == [
        ("cat", "c1.png", "c2.png", "a"),
        ("dog", "d1.png", "d2.png", "a"),
    ]


def d3po_folder(root: Path, *feedback: object) -> dict[str, bytes]:
    write_json(root / "prompt.json", ["a hand", ["a foot"] * 7])
    for i, rows in enumerate(feedback):
        write_json(root / f"annotator_{i}.json", rows)
    return put(root / "images", *[f"{n:05}.png" for n in range(14)])


def test_d3po_feedback_of_one_person(tmp_path: Path) -> None:
    first, second = [0, 0, 0, 0, 0, -1, 0], [7, 6, 5, 4, 3, 2, 1]
    pictures = d3po_folder(tmp_path / "run", [first, second])
    rows = verdicts(converted(tmp_path, "d3po", tmp_path / "run"), pictures)
    assert len(rows) == 2 * 21
    assert [row for row in rows[:21] if row[3] != "tie"] == [
        *(("a hand", f"{n:05}.png", "00005.png", "a") for n in range(5)),
        ("a hand", "00005.png", "00006.png", "b"),
    ]
    assert rows[21:] == [
        ("a foot", f"{7 + i:05}.png", f"{7 + j:05}.png", "a")
        for i in range(7)
        for j in range(i + 1, 7)
    ]


def test_d3po_feedback_of_several_people_is_averaged(tmp_path: Path) -> None:
    people = [[0, 1, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 1], [1, 0, 0, 0, 0, 0, 0]]
    pictures = d3po_folder(tmp_path / "run", *([row, [0] * 6] for row in people))
    rows = verdicts(converted(tmp_path, "d3po", tmp_path / "run"), pictures)
    mean = np.mean(people, axis=0)  # 2/3, 1/3, 0, 0, 0, 0, 1/3
    for _, a, b, outcome in rows:
        difference = mean[int(a[:5])] - mean[int(b[:5])]
        assert outcome == ("tie" if difference == 0 else "a" if difference > 0 else "b")
    assert len(rows) == 21
    assert kinds(tmp_path) == ["the feedback is wrong"]  # six numbers in the second row


def test_d3po_files_of_different_lengths_end_with_the_shortest(tmp_path: Path) -> None:
    d3po_folder(tmp_path / "run", [[1, 0, 0, 0, 0, 0, 0]])
    assert len(converted(tmp_path, "d3po", tmp_path / "run")) == 21
    assert kinds(tmp_path) == ["the files have different lengths"]


# --- records --------------------------------------------------------------------------------------


def test_jsonl_with_guessed_names_paths_and_base64(tmp_path: Path) -> None:
    pictures = put(tmp_path / "img", "a.png", "b.png")
    text = base64.b64encode(pictures["a.png"]).decode()
    uri = "data:image/png;base64," + base64.b64encode(pictures["b.png"]).decode()
    both = {"image_0": "img/a.png", "image_1": "img/b.png"}
    records: list[dict[str, Any]] = [
        {"prompt": "chosen", "chosen": "img/a.png", "rejected": "img/b.png"},
        {"caption": "base64", "win": text, "lose": uri},
        {"prompt": "first", **both, "label": 0},
        {"prompt": "second", **both, "label": "1"},
        {"prompt": "tie", **both, "label": 0.5},
        {"prompt": "pair of labels", **both, "label_0": 0, "label_1": 1, "user_id": 9},
        {"prompt": "seven", **both, "label": 7},
        {"prompt": "true", **both, "label": True},
        {"prompt": "no names", "x": 1},
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, records)) + "\n\n[broken\n", encoding="utf-8-sig")
    rows = converted(tmp_path, "jsonl", path)
    assert verdicts(rows, pictures) == [
        ("chosen", "a.png", "b.png", "a"),
        ("base64", "a.png", "b.png", "a"),
        ("first", "a.png", "b.png", "a"),
        ("second", "a.png", "b.png", "b"),
        ("tie", "a.png", "b.png", "tie"),
        ("pair of labels", "a.png", "b.png", "b"),
    ]
    assert rows[5].who == "9"
    assert kinds(tmp_path) == [
        "the label is missing or wrong",
        "the label is missing or wrong",
        "the names of the pictures are not known",
        "a line is not valid JSON",
    ]


def test_given_names_go_before_guesses(tmp_path: Path) -> None:
    pictures = put(tmp_path, "a.png", "b.png")
    record = {"prompt": "no", "t": "yes", "chosen": "b.png", "rejected": "a.png"}
    record |= {"good": "a.png", "bad": "b.png"}
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(record))
    rows = converted(tmp_path, "jsonl", path, prompt="t", win="good", lose="bad")
    assert verdicts(rows, pictures) == [("yes", "a.png", "b.png", "a")]


BOTH = {"prompt": "p", "chosen": "a.png", "rejected": "b.png", "image_0": "b.png"}
BOTH |= {"image_1": "c.png", "label": 0, "first": "c.png", "second": "d.png", "pick": 1}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ("a.png", "b.png", "a")),
        ({"image_0": "first", "image_1": "second", "label": "pick"}, ("c.png", "d.png", "b")),
        ({"label": "pick"}, ("b.png", "c.png", "b")),
        ({"image_1": "second"}, ("b.png", "d.png", "a")),
        ({"win": "second"}, ("d.png", "b.png", "a")),
    ],
)
def test_a_given_name_says_what_the_others_are(
    tmp_path: Path, given: dict[str, str], expected: tuple[str, str, str]
) -> None:
    pictures = put(tmp_path, "a.png", "b.png", "c.png", "d.png")
    (tmp_path / "pairs.jsonl").write_text(json.dumps(BOTH))
    write_csv(tmp_path / "pairs.csv", [list(BOTH), list(BOTH.values())])
    for kind in ("jsonl", "csv"):
        rows = converted(tmp_path / kind, kind, tmp_path / f"pairs.{kind}", **given)
        assert verdicts(rows, pictures) == [("p", *expected)]


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_given_name_that_is_not_there_is_one_sentence(tmp_path: Path, kind: str) -> None:
    put(tmp_path, "a.png", "b.png", "c.png")
    (tmp_path / "pairs.jsonl").write_text(json.dumps(BOTH))
    write_csv(tmp_path / "pairs.csv", [list(BOTH), list(BOTH.values())])
    for given, part in (
        (
            {"win": "god", "lose": "bad"},
            "there is no 'god', it has prompt, chosen, rejected, image_0",
        ),
        ({"prompt": "promt"}, "there is no 'promt', it has prompt, "),
        ({"label": "pik"}, "there is no 'pik', it has prompt, "),
        ({"win": "chosen", "label": "pick"}, "give win and lose, or image_0, .* not both"),
    ):
        with pytest.raises(InputError, match=part):
            converted(tmp_path / "out", kind, tmp_path / f"pairs.{kind}", **given)


def counted_from(one: bool, labels: list[object]) -> list[list[object]]:
    """Rows of two pictures under names that count from 0 or from 1."""
    names = ("image1_path", "image2_path") if one else ("image_0", "image_1")
    rows: list[list[object]] = [["prompt", *names, "preference"]]
    return rows + [["p", "a.png", "b.png", label] for label in labels]


def test_labels_count_from_one_where_the_names_do(tmp_path: Path) -> None:
    put(tmp_path, "a.png", "b.png")
    path = write_csv(tmp_path / "p.csv", counted_from(True, [1, 2, "1.0", "image_2", 0.5, "b", 3]))
    rows = converted(tmp_path, "csv", path)
    assert [row.outcome for row in rows] == ["a", "b", "a", "b", "tie", "b"]
    assert kinds(tmp_path) == ["the label is missing or wrong"]
    write_csv(path, counted_from(True, [1, 0]))
    with pytest.raises(
        InputError, match=r"line 3: the label is 0, .* give image_0=image1_path and"
    ):
        converted(tmp_path / "again", "csv", path)
    given = {"image_0": "image1_path", "image_1": "image2_path"}
    rows = converted(tmp_path / "given", "csv", path, **given)
    assert [row.outcome for row in rows] == ["b", "a"]
    write_csv(path, counted_from(True, [1, 2]))
    with pytest.raises(InputError, match=r"line 3: the label is 2, .* that are not given"):
        converted(tmp_path / "mixed", "csv", path, **given)


def test_people_are_known_by_whole_numbers_and_nobody_by_none(tmp_path: Path) -> None:
    put(tmp_path, "a.png", "b.png")
    base = {"prompt": "p", "chosen": "a.png", "rejected": "b.png"}
    users = [7, 7.0, float("nan"), None, 0, "", "7.0", 0.5]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({**base, "user_id": user}) + "\n" for user in users))
    expected = ["7", "7", "", "", "0", "", "7.0", "0.5"]
    assert [row.who for row in converted(tmp_path, "jsonl", path)] == expected
    columns = pickapic_columns() | {"user_id": pa.array([7.0, float("nan"), None, 1.0, 1.0, 1.0])}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    rows = converted(tmp_path / "parquet", "pickapic", tmp_path / "a.parquet")
    assert [row.who for row in rows] == ["7", "", ""]


def write_csv(path: Path, rows: list[list[object]], delimiter: str = ",") -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    return path


@pytest.mark.parametrize(("name", "delimiter"), [("p.csv", ","), ("p.tsv", "\t")])
def test_csv_with_quotes_and_line_breaks(tmp_path: Path, name: str, delimiter: str) -> None:
    pictures = put(tmp_path / "img", "a.png", "b.png")
    text = base64.b64encode(image(0) + bytes(200_000)).decode()  # beyond csv's own limit
    table: list[list[object]] = [
        ["prompt", "image_0", "image_1", "label"],
        ['a "quoted", long\nprompt', "a.png", "b.png", "1"],
        ["too few", "a.png"],
        ["tie", "a.png", "b.png", "tie"],
        ["large", text, "b.png", "0"],
        ["wrong", "a.png", "b.png", "2"],
    ]
    path = write_csv(tmp_path / name, table, delimiter)
    rows = converted(tmp_path, "csv", path, images=tmp_path / "img")
    assert [(row.prompt, row.outcome) for row in rows] == [
        ('a "quoted", long\nprompt', "b"),
        ("tie", "tie"),
        ("large", "a"),
    ]
    assert rows[0].image_a == pictures["a.png"]
    assert kinds(tmp_path) == [
        "a row has too few or too many fields",
        "the label is missing or wrong",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "prompt;chosen;rejected\np, q;a.png;b.png\n",
        'prompt, chosen, rejected\n"p, q", a.png, b.png\n',
        ' prompt ,chosen ,"rejected"\n"p, q",a.png,b.png\n',
        "prompt\tchosen\trejected\np, q\ta.png\tb.png\n",
    ],
)
def test_csv_of_other_habits(tmp_path: Path, text: str) -> None:
    pictures = put(tmp_path, "a.png", "b.png")
    (tmp_path / "p.csv").write_text(text)
    rows = converted(tmp_path, "csv", tmp_path / "p.csv")
    assert verdicts(rows, pictures) == [("p, q", "a.png", "b.png", "a")]


@pytest.mark.parametrize(
    ("kind", "data", "part"),
    [
        ("csv", b"promt,chosen,rejected\n", "no column is called prompt or .*it has promt, chosen"),
        ("csv", b"prompt,good,bad\n", "pictures are not known, it has prompt, good, bad"),
        ("csv", b"prompt,image_0,image_1\n", "no column is called label or .*it has prompt, im"),
        ("kto", b"prompt,picture,label\n", "no column is called file_path or .*it has prompt, pi"),
        ("csv", b"prompt,chosen,rejected\rp,a.png,b.png\r", "its lines end in CR alone"),
        ("csv", "prompt,chosen,rejected\n".encode("utf-16"), "is UTF-16 text, it must be UTF-8"),
        ("jsonl", '{"prompt": "p"}\n'.encode("utf-16"), "is UTF-16 text, it must be UTF-8"),
        ("jsonl", b'{"promt": "p"}\n', "no column is called prompt or .*it has promt"),
    ],
)
def test_what_the_header_lacks_is_one_sentence(
    tmp_path: Path, kind: str, data: bytes, part: str
) -> None:
    (tmp_path / "p.csv").write_bytes(data)
    with pytest.raises(InputError, match=part) as raised:
        converted(tmp_path, kind, tmp_path / "p.csv")
    assert "\n" not in str(raised.value)


def test_invoke_training_metadata(tmp_path: Path) -> None:
    root = tmp_path / "set"
    pictures = put(root, "images/0.png", "images/1.png")
    base = {"prompt": "p", "image_0": "images/0.png", "image_1": "images/1.png"}
    votes = [(True, False), (False, True), (False, False)]
    lines = [json.dumps({**base, "prefer_0": a, "prefer_1": b}) for a, b in votes]
    (root / "metadata.jsonl").write_text("\n".join(lines))
    rows = converted(tmp_path, "invoke-training", root)
    assert [row[3] for row in verdicts(rows, pictures)] == ["a", "b", "tie"]
    (root / "metadata.jsonl").unlink()
    with pytest.raises(InputError, match=r"holds no metadata\.jsonl"):
        converted(tmp_path / "again", "invoke-training", root)


def test_kto_pairs_every_good_with_every_bad(tmp_path: Path) -> None:
    pictures = put(tmp_path, *[f"{n}.png" for n in range(8)])
    table: list[list[object]] = [
        ["file_path", "caption", "label"],
        ["0.png", "cat", "exclusive_win"],
        ["1.png", "dog", 0],
        ["2.png", "cat", "exclusive_lose"],
        ["3.png", "cat", "up"],
        ["4.png", "cat", "down"],
        ["5.png", "bird", 1],
        ["6.png", "dog", "true"],
        ["7.png", "cat", "perhaps"],
    ]
    rows = converted(tmp_path, "kto", write_csv(tmp_path / "t.csv", table))
    assert verdicts(rows, pictures) == [
        ("cat", "0.png", "2.png", "a"),
        ("cat", "3.png", "4.png", "a"),
        ("cat", "0.png", "4.png", "a"),
        ("cat", "3.png", "2.png", "a"),
        ("dog", "6.png", "1.png", "a"),
    ]
    assert kinds(tmp_path) == [
        "no picture of the same prompt has the other label",
        "the label is missing or wrong",
    ]


@pytest.mark.parametrize(("good", "bad"), [(3, 4), (4, 2), (1, 5), (4, 4)])
def test_kto_makes_each_pair_once_and_a_cap_is_fair(tmp_path: Path, good: int, bad: int) -> None:
    pictures = put(tmp_path, *[f"{n}.png" for n in range(good + bad)])
    table: list[list[object]] = [["image", "prompt", "label"]]
    table += [[f"{n}.png", "p", int(n < good)] for n in range(good + bad)]
    path = write_csv(tmp_path / "t.csv", table)
    pairs = [row[1:3] for row in verdicts(converted(tmp_path, "kto", path), pictures)]
    assert len(set(pairs)) == len(pairs) == good * bad
    cut = converted(tmp_path / "cut", "kto", path, max_pairs=good)
    assert len({row.image_a for row in cut}) == good
    (left_out,) = rejected(tmp_path / "cut")
    assert f"{good * bad - good} more pairs" in left_out["reason"]


# --- folders --------------------------------------------------------------------------------------


def test_folders_of_winners_and_losers(tmp_path: Path) -> None:
    root = tmp_path / "set"
    names = ("w/b.png", "l/b.jpg", "w/a.png", "l/a.png", "w/alone.png", "l/c.png", "w/c.png")
    pictures = put(root, *names)
    (root / "l" / "a.txt").write_text(" the prompt of a\n")
    (root / "w" / "b.caption").write_text("b, 日本語 🐈")
    rows = converted(tmp_path, "folders", root)
    assert verdicts(rows, pictures) == [
        ("the prompt of a", "w/a.png", "l/a.png", "a"),
        ("b, 日本語 🐈", "w/b.png", "l/b.jpg", "a"),
    ]
    assert kinds(tmp_path) == ["a picture has no partner", "the prompt is empty"]


def test_folders_with_one_file_of_prompts(tmp_path: Path) -> None:
    root = tmp_path / "set"
    put(root, "win/1.png", "lose/1.png", "win/2.png", "lose/2.png", "lose/2.jpg")
    (root / "prompts.txt").write_text("1.png\tone\tand more\n2\ttwo\n3\tthree\nno tab\n")
    rows = converted(tmp_path, "folders", root)
    assert [row.prompt for row in rows] == ["one\tand more"]
    assert kinds(tmp_path) == [
        "a name stands for more than one picture or prompt",
        "a prompt has no pictures",
    ]
    with pytest.raises(InputError, match="does not hold the folders w and l"):
        converted(tmp_path / "again", "folders", root / "win")


def test_sd_scripts_subsets(tmp_path: Path) -> None:
    root = tmp_path / "set"
    pictures = put(root, "10_cat/w/x.png", "10_cat/l/x.png", "1_a dog/w/y.png", "1_a dog/l/y.png")
    put(root, "other/z.png")
    (root / "10_cat" / "w" / "x.caption").write_text("a cat on a mat")
    rows = converted(tmp_path, "sd-scripts", root)
    assert verdicts(rows, pictures) == [
        ("a cat on a mat", "10_cat/w/x.png", "10_cat/l/x.png", "a"),
        ("a dog", "1_a dog/w/y.png", "1_a dog/l/y.png", "a"),
    ]


# --- reading piece by piece -----------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1000])
def test_json_items_are_those_of_json_however_the_file_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr("fifa.sources.reading._CHUNK", chunk)
    items = [12, 3.5, "a ] , [ 日本語 🐈 \\", {"x": [1, {"y": None}]}, [], "", True, -1e-3]
    for text in (json.dumps(items), json.dumps(items, ensure_ascii=False, indent=2)):
        path = tmp_path / "x.json"
        path.write_text(text, encoding="utf-8")
        assert list(json_items(path)) == items


@pytest.mark.parametrize("text", ["", "{}", "[1, 2", '[1, 2, "x', "[1, 2, nope]", "[" * 100_000])
def test_json_that_breaks_off_says_so_at_the_end(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    *whole, last = json_items(path)
    assert isinstance(last, InputError)
    assert whole in ([], [1], [1, 2])


def test_grouped_keeps_the_order_of_arrival_or_of_names() -> None:
    rows = [("b", 1), ("a", 2), ("b", 3), ("\udcff", None), ("a", [4])]
    assert list(grouped(rows)) == [("b", [1, 3]), ("a", [2, [4]]), ("\udcff", [None])]
    assert [key for key, _ in grouped(rows, by_name=True)] == ["a", "b", "\udcff"]


def test_a_tie_beside_a_label_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("prompt,image_0,image_1,label,even\np,a.png,b.png,0,1\n")
    with pytest.raises(InputError, match="tie goes with win and lose"):
        converted(tmp_path, "csv", tmp_path / "x.csv", tie="even")


def test_ties_and_people_of_chosen_and_rejected(tmp_path: Path) -> None:
    for name, tie, who in (("guessed", "tie", "annotator"), ("given", "even", "rater")):
        (tmp_path / name).mkdir()
        for side in ("a", "b"):
            (tmp_path / name / f"{side}.png").write_bytes(image(ord(side)))
        base = {"prompt": "p", "winner": "a.png", "loser": "b.png"}
        records = [{**base, tie: value, who: i} for i, value in enumerate([True, False, None, "1"])]
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (tmp_path / name / "x.jsonl").write_text(lines)
        options = {} if name == "guessed" else {"tie": tie, "user": who}
        rows = converted(tmp_path / name, "jsonl", tmp_path / name / "x.jsonl", **options)
        assert [row.outcome for row in rows] == ["tie", "a", "a", "tie"]
        assert [row.who for row in rows] == ["0", "1", "2", "3"]
