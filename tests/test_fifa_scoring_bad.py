"""More than a thousand bad inputs through a scoring pass: each told apart, none fatal.

Good rows stand among them, and come out as they do alone.
"""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pair_files import picture, png_that_claims
from PIL import Image

from fifa.config import InputError
from fifa.images import decode, encode_jpeg
from fifa.scoring import SCORES, ScoreConfig, score
from fifa.sources.convert import ConvertConfig, convert

REWARD = "jpeg_incompressibility"
WORDS = ("🐈‍⬛🔥", "قطة حمراء", "חתול שחור", "日本語", "a red cat", "Ça va, naïve")
Row = dict[str, Any]

BAD_PAIRS, BAD_RECORDS, BAD_PROMPTS = 640, 200, 210  # and one table of each of WRONG_TYPES


def jpeg(seed: int, side: int = 40) -> bytes:
    return encode_jpeg(decode(picture(seed, side), ""), 90)


def zip_bomb() -> bytes:
    """A whole PNG: 80 million pixels in ten kilobytes."""
    buffer = io.BytesIO()
    Image.new("1", (10_000, 8_000)).save(buffer, format="PNG")
    return buffer.getvalue()


def of_another_kind(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, format=kind)
    return buffer.getvalue()


def avif_without_its_frame() -> bytes:
    """An AVIF whose colours cannot be decoded, which Pillow tells as a RuntimeError."""
    buffer = io.BytesIO()
    Image.fromarray(decode(picture(1, 40), "")).save(buffer, format="AVIF")
    data = buffer.getvalue()
    start = data.index(b"mdat") + 4
    return data[:start] + bytes(len(data) - start)


BAD_AVIF = avif_without_its_frame()
BOMB = zip_bomb()
POSTSCRIPT = of_another_kind("EPS")


# --- pair tables ----------------------------------------------------------------------------------


def cut_picture(draw: random.Random, row: Row) -> None:
    whole = draw.choice((jpeg, picture))(draw.randrange(99), 40)
    row[draw.choice(("jpg_0", "jpg_1"))] = whole[: draw.randrange(1, len(whole) - 20)]


def damaged_avif(draw: random.Random, row: Row) -> None:
    row[draw.choice(("jpg_0", "jpg_1"))] = BAD_AVIF


def no_picture(draw: random.Random, row: Row) -> None:
    noise = draw.randbytes(draw.randrange(1, 400))
    other = (None, b"", b"\0" * 50, noise, b"GIF89a", b"\xff\xd8\xff\xe0" + noise, POSTSCRIPT)
    row[draw.choice(("jpg_0", "jpg_1"))] = draw.choice(other)


def bomb(draw: random.Random, row: Row) -> None:
    claims = png_that_claims(draw.randrange(8_200, 70_000), 9_000)
    row[draw.choice(("jpg_0", "jpg_1"))] = draw.choice((BOMB, claims))


def bad_caption(draw: random.Random, row: Row) -> None:
    wild = (None, "", " \n\t", "\u200b\u200f", "nul \0 byte", "\0", "\ufeff")
    row["caption"] = draw.choice((*wild, draw.choice(WORDS) * 25_000, "x" * 50_000))


def broken_text(draw: random.Random, row: Row) -> None:
    """Bytes that are no UTF-8: the column is written as bytes and called text."""
    row["caption"] = draw.choice(("half ", draw.choice(WORDS))) + "\udcff\udc80"


def bad_label(draw: random.Random, row: Row) -> None:
    values = (7.0, -1.0, 0.7, None, float("nan"), float("inf"), 1e300)
    row[draw.choice(("label_0", "label_1"))] = draw.choice(values)


def equal_labels(draw: random.Random, row: Row) -> None:
    row["label_0"] = row["label_1"] = draw.choice((0.0, 1.0, 0.25))


def unlabelled(draw: random.Random, row: Row) -> None:
    row["has_label"] = False


PAIR_FAULTS: tuple[Callable[[random.Random, Row], None], ...] = (
    cut_picture,
    damaged_avif,
    no_picture,
    bomb,
    bad_caption,
    broken_text,
    bad_label,
    equal_labels,
    unlabelled,
)


def good_pair(draw: random.Random, i: int) -> Row:
    pictures = {"jpg_0": jpeg(2 * i, 16), "jpg_1": picture(2 * i + 1)}
    labels = {"label_0": 1.0, "label_1": 0.0, "has_label": True}
    return {"caption": f"{draw.choice(WORDS)} {i}", **pictures, **labels}


def write_rows(path: Path, rows: list[Row]) -> Path:
    """A Parquet file of the rows; text goes in as it is, valid or not."""
    table = pa.Table.from_pylist([{**row, "caption": None} for row in rows])
    texts = [row["caption"] for row in rows]
    raw = [None if text is None else text.encode("utf-8", "surrogateescape") for text in texts]
    caption = pa.Array.from_buffers(pa.string(), len(raw), pa.array(raw, pa.binary()).buffers())
    place = table.column_names.index("caption")
    pq.write_table(table.set_column(place, "caption", caption), path, row_group_size=64)
    return path


def results(out: Path) -> dict[str, list[Any]]:
    table = pq.read_table(out / SCORES, columns=["reward_0", "reward_1", "win", "quality"])
    return table.to_pydict()


def told(out: Path, count: int) -> set[str]:
    """The kinds of the rows set aside, each with a reason of its own."""
    lines = (out / "rejected.jsonl").read_text(encoding="utf-8").splitlines()
    bad = [json.loads(line) for line in lines]
    assert len(bad) == len({row["row"] for row in bad}) == count
    assert all(row["kind"] and len(row["reason"]) < 500 for row in bad)
    assert not any("\n" in row["reason"] for row in bad)
    return {row["kind"] for row in bad}


def test_bad_pairs_are_set_aside_and_good_ones_as_they_are_alone(tmp_path: Path) -> None:
    draw = random.Random(0)
    rows, good = [], []
    for i in range(800):
        row = good_pair(draw, i)
        if i % 5 == 0:
            good.append(i)
        else:
            PAIR_FAULTS[i % len(PAIR_FAULTS)](draw, row)
        rows.append(row)
    data = write_rows(tmp_path / "bad.parquet", rows)
    summary = score(ScoreConfig(data=data, out=tmp_path / "out", reward=REWARD))
    assert (summary.rows, summary.scored) == (800, 160)
    assert pq.read_table(tmp_path / "out" / SCORES)["row"].to_pylist() == good
    assert told(tmp_path / "out", BAD_PAIRS) == {
        "an image cannot be decoded",
        "an image is missing or empty",
        "the caption is missing or empty",
        "the caption is not valid Unicode",
        "the label is missing or wrong",
        "the prompt holds a NUL byte",
        "the prompt is empty",
        "the prompt is too long",
    }
    clean = write_rows(tmp_path / "good.parquet", [rows[i] for i in good])
    score(ScoreConfig(data=clean, out=tmp_path / "alone", reward=REWARD))
    assert results(tmp_path / "alone") == results(tmp_path / "out")


TYPES = (pa.int64(), pa.bool_(), pa.list_(pa.string()), pa.struct([("bytes", pa.binary())]))
WRONG_TYPES = [
    *(("caption", kind) for kind in (*TYPES, pa.binary())),
    *((name, kind) for name in ("jpg_0", "jpg_1") for kind in (*TYPES, pa.string())),
    *(
        (name, kind)
        for name in ("label_0", "label_1")
        for kind in (pa.string(), pa.binary(), *TYPES[1:])
    ),
]


def test_a_column_of_another_type_is_one_sentence(tmp_path: Path) -> None:
    schema = {"caption": pa.string(), "jpg_0": pa.binary(), "jpg_1": pa.binary()}
    schema |= {"label_0": pa.float64(), "label_1": pa.float64()}
    for number, (name, kind) in enumerate(WRONG_TYPES):
        path = tmp_path / f"{number}.parquet"
        wrong = pa.schema({**schema, name: kind})
        pq.write_table(pa.Table.from_pylist([{}] * 3, schema=wrong), path)
        with pytest.raises(InputError, match=rf"column '{name}' is .*, it must be") as told_of:
            score(ScoreConfig(data=path, out=tmp_path / "out", reward=REWARD))
        assert "\n" not in str(told_of.value)
    assert not (tmp_path / "out").exists()


# --- records --------------------------------------------------------------------------------------


def bad_record(draw: random.Random, i: int) -> object:
    """A pair of the JSON reader in which one thing is wrong."""
    row: Row = {"prompt": f"{draw.choice(WORDS)} {i}", "chosen": "0.png", "rejected": "1.jpg"}
    wild: tuple[object, ...] = (None, 7, 1.5, True, [], {}, ["a"], {"path": None}, "nowhere.png")
    wild = (*wild, "../../nothing", "\0.png", "é/" * 25_000, "cut.jpg", "bomb.png", "text.png")
    match i % 4:
        case 0:
            row[draw.choice(("chosen", "rejected"))] = draw.choice(wild)
        case 1:
            row["prompt"] = draw.choice((None, 7, [], {}, "", "\0", "\u200b", "y" * 50_000))
        case 2:
            del row[draw.choice(("prompt", "chosen", "rejected"))]
        case 3:
            pictures = {"image_0": row.pop("chosen"), "image_1": row.pop("rejected")}
            row |= {**pictures, "label": draw.choice((7, -1, "both", None, [0], "", True, "🐈"))}
    return row


def test_bad_records_are_set_aside_on_the_way_to_the_table(tmp_path: Path) -> None:
    draw = random.Random(1)
    files = {"0.png": picture(1), "1.jpg": jpeg(2), "cut.jpg": jpeg(3)[:300], "bomb.png": BOMB}
    for name, data in {**files, "text.png": b"no picture"}.items():
        (tmp_path / name).write_bytes(data)
    good = {"prompt": "a red cat", "chosen": "0.png", "rejected": "1.jpg"}
    records = [good if i % 6 == 0 else bad_record(draw, i) for i in range(240)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    counts = convert(ConvertConfig(source="jsonl", path=str(path), out=tmp_path / "pairs"))
    assert counts.written == 40
    told(tmp_path / "pairs", BAD_RECORDS)
    summary = score(ScoreConfig(data=tmp_path / "pairs", out=tmp_path / "out", reward=REWARD))
    assert (summary.scored, summary.rejected) == (40, {})


def test_bad_prompts_are_set_aside_and_good_ones_as_they_are_alone(tmp_path: Path) -> None:
    draw = random.Random(2)
    wild = (None, 7, 1.5, True, [], ["a"], {}, {"prompt": None}, {"caption": 3}, "", " \t", "\0")
    wild = (*wild, "nul\0", "z" * 50_000, "\u200b\u200f", "half \ud83d", {"text": "\ufeff"})
    broken = (b"{", b"[" * 20_000, b"\xff\xfe\xfa", b'{"prompt": 1e999999', b"nul\0", b'"\xff"')
    lines, good = [], []
    for i in range(280):
        if i % 4 == 0:
            good.append(f"{draw.choice(WORDS)} {i}")
            lines.append(json.dumps(draw.choice((good[-1], {"prompt": good[-1]}))).encode())
        elif i % 4 == 1:
            lines.append(draw.choice(broken))
        else:
            lines.append(json.dumps(draw.choice(wild)).encode())
    (tmp_path / "bad.jsonl").write_bytes(b"\n".join(lines))
    (tmp_path / "good.txt").write_text("\n".join(good), encoding="utf-8")
    for name in ("bad.jsonl", "good.txt"):
        score(ScoreConfig(data=tmp_path / name, out=tmp_path / f"{name}-out", reward="none"))
    assert len(told(tmp_path / "bad.jsonl-out", BAD_PROMPTS)) == 6
    alone = results(tmp_path / "good.txt-out")
    assert results(tmp_path / "bad.jsonl-out") == alone
    assert np.isfinite(alone["quality"]).all()


def test_they_are_more_than_a_thousand() -> None:
    assert BAD_PAIRS + len(WRONG_TYPES) + BAD_RECORDS + BAD_PROMPTS >= 1000
