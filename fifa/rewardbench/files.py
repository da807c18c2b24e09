"""Readers of pairs and ratings that people have judged: one function a layout, one line of KINDS.

A reader takes the path and the folder with pictures (None: only what is in the files) and yields an
Item with the judges' verdicts, or an Aside for what is none. `fifa.rewardbench.reading` turns the
verdicts into labels. Sets that ship no pictures yield items without them.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

from fifa.bench import LABELS, SCORE_KEYS, read_row
from fifa.config import InputError
from fifa.pairs import BadRow, PairTable
from fifa.rewardbench.table import Item

VERDICTS = {"a": 0, "b": 1, "tie": -1}
ENDINGS = ("", ".png", ".jpg", ".jpeg", ".webp")


class Aside(NamedTuple):
    """Something in a file that is no pair, and why."""

    where: str
    reason: str


Found = Iterator[Item | Aside]


def _item(
    name: str,
    scenario: str,
    prompt: str,
    sides: tuple[bytes | None, bytes | None],
    verdicts: tuple[int, ...],
    given: Mapping[str, tuple[float, float]] | None = None,
) -> Item:
    """An item before its label is known."""
    return Item(name, scenario, prompt, *sides, -1, verdicts, agreed=False, given=given or {})


# ---- pairs ---------------------------------------------------------------------------------------


def pairs(path: Path, images: Path | None) -> Found:
    """A pair table, as `fifa convert` and `fifa world` write it: Pick-a-Pic, HPDv2, ImageReward."""
    table = PairTable.open(path)
    for i, group in enumerate(table.row_groups()):
        for offset, row in enumerate(table.judgments(i)):
            if isinstance(row, BadRow):
                yield Aside(f"row {row.row}", row.kind)
                continue
            verdict = (VERDICTS[row.outcome],)
            sides = (row.image_a, row.image_b)
            yield _item(f"row-{group.start + offset}", "overall", row.prompt, sides, verdict)


def genai(path: Path, images: Path | None) -> Found:
    """GenAI-Bench of GenAI-Arena, image generation: Parquet, left_image, right_image, vote_type."""
    votes = {"leftvote": 0, "rightvote": 1, "tievote": -1, "bothbad_vote": -1}
    for where, _, row in _parquet_rows(path, ("prompt", "left_image", "right_image", "vote_type")):
        vote = votes.get(str(row["vote_type"]))
        sides = _bytes(row["left_image"]), _bytes(row["right_image"])
        if vote is None:
            yield Aside(where, f"the vote is none of {', '.join(votes)}")
        elif None in sides or not row["prompt"]:
            yield Aside(where, "a picture or the prompt is missing")
        else:
            yield _item(where, "overall", str(row["prompt"]), sides, (vote,))


def mjbench(path: Path, images: Path | None) -> Found:
    """MJ-Bench: Parquet, caption, image0, image1, label 0 or 1; a scenario a category or file."""
    for where, file, row in _parquet_rows(path, ("caption", "image0", "image1", "label")):
        sides = _bytes(row["image0"]), _bytes(row["image1"])
        if row["label"] not in (0, 1):
            yield Aside(where, "the label is not 0 or 1")
        elif None in sides or not row["caption"]:
            yield Aside(where, "a picture or the prompt is missing")
        else:
            scenario = str(row.get("category") or file.stem.split("-")[0]).lower()
            yield _item(where, scenario, str(row["caption"]), sides, (int(row["label"]),))


def _parquet_rows(
    path: Path, needed: tuple[str, ...]
) -> Iterator[tuple[str, Path, dict[str, Any]]]:
    """(where, file, row) of a Parquet file or of all of a folder that have the needed columns."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise InputError(f"the folder {path} holds no .parquet file")
    for file in files:
        try:
            with pq.ParquetFile(file) as table:
                absent = [name for name in needed if name not in table.schema_arrow.names]
                if absent:
                    raise InputError(f"{file} has no column '{absent[0]}'")
                name = str(file.relative_to(path).with_suffix("")) if path.is_dir() else file.stem
                row = 0
                for batch in table.iter_batches(batch_size=32):
                    for record in batch.to_pylist():
                        yield f"{name}-{row}", file, record
                        row += 1
        except (OSError, pa.ArrowException) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"cannot read {file} as Parquet: {reason}") from None


def _bytes(cell: Any) -> bytes | None:
    """An encoded picture as `datasets` stores it: bytes, or a struct that holds them."""
    found = cell.get("bytes") if isinstance(cell, Mapping) else cell
    return found if isinstance(found, bytes) and found else None


# ---- scored pairs --------------------------------------------------------------------------------


def scored(path: Path, images: Path | None) -> Found:
    """Scored pairs in JSON, a file a scorer: label, score_0 and score_1 (or prob_0 and prob_1)."""
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files:
        raise InputError(f"the folder {path} holds no .json file")
    known: dict[str, tuple[str, int, dict[str, tuple[float, float]]]] = {}
    for file in files:
        rows = _json_list(file)
        keys = next((k for k in SCORE_KEYS if any(k[0] in row for row in rows)), None)
        if keys is None:
            raise InputError(f"{file}: no row has score_0 and score_1, or prob_0 and prob_1")
        for number, row in enumerate(rows):
            label = LABELS.get(str(row.get("label")).strip())
            if label is None:
                yield Aside(f"{file.name} row {number}", "the label is not 0, 1 or tie")
                continue
            name, caption = str(row.get("id", number)), str(row.get("caption", ""))
            found = known.setdefault(name, (caption, label, {}))
            if found[:2] != (caption, label):
                yield Aside(f"{file.name} row {number}", "files disagree about the pair of this id")
                continue
            scores = read_row(row, keys)
            if isinstance(scores, str):
                yield Aside(f"{file.name} row {number}", scores)
            else:
                found[2][file.stem] = scores[:2]
    for name, (caption, label, given) in known.items():
        yield _item(name, "overall", caption, (None, None), (label,), given)


def _json_list(file: Path) -> list[Mapping[str, Any]]:
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file} is not a JSON file ({error})") from None
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
        raise InputError(f"{file} must be a JSON list of scored pairs")
    return rows


# ---- ratings -------------------------------------------------------------------------------------


def agiqa(path: Path, images: Path | None) -> Found:
    """AGIQA-3K's data.csv: mean opinions of quality and of alignment, two scenarios."""
    groups: dict[str, list[tuple[str, dict[str, float]]]] = {}
    for number, row in enumerate(_csv(path, "data.csv", ("name", "prompt", *_OPINIONS.values()))):
        try:
            opinions = {name: _number(row[column]) for name, column in _OPINIONS.items()}
        except ValueError:
            yield Aside(f"row {number}", "an opinion is no number")
            continue
        groups.setdefault(row["prompt"], []).append((row["name"], opinions))
    for prompt, group in groups.items():
        for (a, of_a), (b, of_b) in combinations(group, 2):
            sides = _file(images, a), _file(images, b)
            for scenario in _OPINIONS:
                # What it was judged by gives the label, the other opinion a score to compare with.
                given = {n: (of_a[n], of_b[n]) for n in _OPINIONS if n != scenario}
                verdict = (_better(of_a[scenario], of_b[scenario]),)
                yield _item(f"{scenario}-{a}-{b}", scenario, prompt, sides, verdict, given)


_OPINIONS = {"alignment": "mos_align", "quality": "mos_quality"}


def tifa(path: Path, images: Path | None) -> Found:
    """TIFA160's Likert ratings: each worker who rated both pictures of a prompt is a judge.

    Prompts are read from the `*dev-anns.csv` beside it; pictures from IMAGES/MODEL/ITEM.png (.jpg).
    """
    needed = ("t2i_model", "item_id", "source_id", "worker_id", "answer")
    ratings: dict[tuple[str, str], dict[str, dict[str, float]]] = {}
    for number, row in enumerate(_csv(path, "tifa160-likert-anns.csv", needed)):
        try:
            answer = _number(row["answer"])
        except ValueError:
            yield Aside(f"row {number}", "the answer is no number")
            continue
        models = ratings.setdefault((row["item_id"], row["source_id"]), {})
        models.setdefault(row["t2i_model"], {})[row["worker_id"]] = answer
    texts = _texts(path if path.is_dir() else path.parent)
    for (item, source), models in ratings.items():
        for (a, of_a), (b, of_b) in combinations(sorted(models.items()), 2):
            verdicts = tuple(_better(of_a[w], of_b[w]) for w in sorted(of_a.keys() & of_b.keys()))
            if not verdicts:
                yield Aside(f"{item} {a} {b}", "no worker rated both pictures")
                continue
            sides = _file(images, f"{a}/{item}"), _file(images, f"{b}/{item}")
            prompt = texts.get(source, item)
            yield _item(f"{item}-{a}-{b}", "alignment", prompt, sides, verdicts)


def _texts(folder: Path) -> dict[str, str]:
    """Prompt of each source id, as far as a file beside the ratings tells."""
    found = {}
    for file in sorted(folder.glob("*dev-anns.csv")):
        for row in _csv(file, file.name, ("item_id", "text")):
            found[row["item_id"]] = row["text"]
    return found


def _number(text: str) -> float:
    """A finite number; ValueError for anything else, also for nan and inf."""
    found = float(text)
    if not math.isfinite(found):
        raise ValueError(f"{text} is not finite")
    return found


def _better(first: float, second: float) -> int:
    return -1 if first == second else int(second > first)


def _csv(path: Path, name: str, needed: tuple[str, ...]) -> Iterator[dict[str, str]]:
    """The rows of a CSV file, or of the file of this name in a folder."""
    file = path / name if path.is_dir() else path
    try:
        with file.open(encoding="utf-8-sig", newline="") as opened:
            reader = csv.DictReader(opened, restval="")
            absent = [column for column in needed if column not in (reader.fieldnames or ())]
            if absent:
                raise InputError(f"{file} has no column '{absent[0]}'")
            yield from reader
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"cannot read {file}: {error}") from None


def _file(images: Path | None, name: str) -> bytes | None:
    """The picture of this name, with any of ENDINGS; None where there is none."""
    if images is None:
        return None
    for ending in ENDINGS:
        file = images / (name + ending)
        if file.is_file():
            return file.read_bytes()
    return None
