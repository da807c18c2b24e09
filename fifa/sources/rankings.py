"""Readers of ranked or rated groups of pictures: every two pictures of a group are a judgment."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import combinations, zip_longest
from pathlib import Path
from typing import Any

from fifa.config import InputError
from fifa.pairs import BadRow, Judgment, RowError
from fifa.sources.reading import (
    Found,
    ReadOptions,
    existing,
    grouped,
    json_items,
    json_lines,
    number,
    outcome_of,
    picture,
    set_aside,
    shown,
)


def hpdv2(path: str, options: ReadOptions) -> Iterator[Found]:
    """HPDv2 JSON: prompt, image_path and rank (1 is best) or human_preference (1 is preferred).

    Pictures are looked for in the folder `images`, by their path or else by their name.
    """
    file = existing(path, "HPDv2's train.json or test.json")
    for row, (where, record) in enumerate(_records(file)):
        yield from _ranking(row, where, record, options.images or file.parent)


def imagereward(path: str, options: ReadOptions) -> Iterator[Found]:
    """ImageRewardDB JSON, file or folder: prompt, generations and ranking, or a row a picture.

    Rank 1 is best and equal ranks are ties. Rows of one picture each (prompt_id, prompt,
    image_path, rank) are brought together by prompt_id and prompt.
    """
    root = existing(path, "a JSON file of ImageRewardDB, or the folder of them")
    files = [root] if root.is_file() else sorted(root.rglob("*.json"))
    if not files:
        raise InputError(f"the folder {root} holds no .json file")
    row = 0
    for file in files:
        for found in _by_prompt(file):
            if isinstance(found, BadRow):
                yield found
            else:
                yield from _ranking(row, *found, options.images or file.parent)
            row += 1


def d3po(path: str, options: ReadOptions) -> Iterator[Found]:
    """D3PO's folder: prompt.json, images/NNNNN.png, and JSON of 7 numbers a row, higher is better.

    Every JSON file but prompt.json is an annotator, and their numbers are averaged. Picture k of
    row r is number 7 r + k. Rows end where the shortest file ends.
    """
    folder = existing(path, "the folder with prompt.json and images/ that D3PO sampled")
    people = [file for file in sorted(folder.glob("*.json")) if file.name != "prompt.json"]
    if not people or not (folder / "prompt.json").is_file():
        raise InputError(f"{folder} must hold prompt.json and at least one JSON file of feedback")
    columns = [json_items(file) for file in (folder / "prompt.json", *people)]
    for row, (prompt, *votes) in enumerate(zip_longest(*columns, fillvalue=_END)):
        where = f"row {row}"
        if _END in (prompt, *votes):
            short = "some of the files end here, others go on"
            yield set_aside(row, RowError(where, "the files have different lengths", f", {short}"))
            return
        if isinstance(prompt, list) and prompt:  # one prompt a picture, all the same
            prompt = prompt[0]
        numbers = range(row * options.group, (row + 1) * options.group)
        record = {"prompt": prompt, "image_path": [f"{n:05}.png" for n in numbers]}
        who = people[0].stem if len(people) == 1 else ""
        try:
            record["score"] = _mean(votes, options.group, where)
        except RowError as error:
            yield set_aside(row, error)
            continue
        yield from _ranking(row, where, record, options.images or folder / "images", who)


_END = object()  # after the last row of a file


def _mean(votes: Sequence[Any], group: int, where: str) -> list[float]:
    """The mean of each picture's votes over the annotators."""
    for vote in votes:
        if isinstance(vote, RowError):
            raise vote
        if not isinstance(vote, list) or len(vote) != group:
            detail = f", a row must be {group} numbers, it is {shown(vote)}"
            raise RowError(where, "the feedback is wrong", detail)
    values = [[number(value, where, "the feedback") for value in vote] for vote in votes]
    return [sum(column) / len(values) for column in zip(*values, strict=True)]


# ---- records -------------------------------------------------------------------------------------


def _records(file: Path) -> Iterator[tuple[str, Any]]:
    """(where, record) of a JSON array, or of JSON lines."""
    if file.suffix == ".jsonl":
        for _, where, record in json_lines(file):
            yield where, record
    else:
        for item, record in enumerate(json_items(file)):
            yield f"{file.name} item {item}", record


def _by_prompt(file: Path) -> Iterator[tuple[str, Any] | BadRow]:
    """(where, record) of each prompt; rows of one picture are brought together."""
    for key, group in grouped(_keyed(file)):
        kind, value = json.loads(key)
        if kind == "bad":
            yield BadRow(**group[0])
        elif kind == "whole":
            yield value, group[0]
        else:
            joined = {name: [row.get(name) for row in group] for name in ("image_path", "rank")}
            name = value[1] if value[0] is None else value[0]
            yield f"{file.name} prompt {shown(name)}", {**group[0], **joined}


def _keyed(file: Path) -> Iterator[tuple[str, Any]]:
    """Each record of a file with the key of what it belongs to."""
    for item, (where, record) in enumerate(_records(file)):
        if isinstance(record, RowError):
            yield json.dumps(["bad", item]), asdict(set_aside(item, record))
        elif isinstance(record, dict) and isinstance(record.get("image_path"), str):
            # The prompt as well: an id may be null in every row.
            name = record.get("prompt_id"), record.get("prompt")
            yield json.dumps(["part", name]), record
        else:
            yield json.dumps(["whole", where]), record


# ---- a ranking -----------------------------------------------------------------------------------

_PICTURES = ("image_path", "file_path", "generations", "images")
# name -> whether a higher number is the better one
_ORDERS = {"rank": False, "ranking": False, "human_preference": True, "score": True}


def _ranking(row: int, where: str, record: object, folder: Path, who: str = "") -> Iterator[Found]:
    """Every two pictures of a record as a judgment; pictures that cannot be read are left out."""
    try:
        prompt, paths, goodness = _parsed(record, where)
    except RowError as error:
        yield set_aside(row, error)
        return
    pictures: list[tuple[bytes, float]] = []
    for path, value in zip(paths, goodness, strict=True):
        try:
            pictures.append((picture(path, folder, where, by_name=True), value))
        except RowError as error:
            yield set_aside(row, error)
    if len(pictures) < 2:
        yield set_aside(row, RowError(where, "a ranking needs at least two pictures"))
    for (first, a), (second, b) in combinations(pictures, 2):
        yield Judgment(prompt, first, second, outcome_of(a, b), who=who, where=where)


def _parsed(record: object, where: str) -> tuple[str, list[Any], list[float]]:
    """Prompt, pictures, and as many numbers of which the higher is better."""
    if isinstance(record, RowError):
        raise record
    if not isinstance(record, Mapping):
        raise RowError(where, "a record is no JSON object", f", it is {shown(record)}")
    prompt = record.get("prompt")
    if isinstance(prompt, RowError):
        raise prompt
    if not isinstance(prompt, str):
        raise RowError(where, "the prompt is missing or no text", f", it is {shown(prompt)}")
    paths = next((record[name] for name in _PICTURES if record.get(name)), None)
    name = next((name for name in _ORDERS if record.get(name)), None)
    if not isinstance(paths, list) or name is None or not isinstance(record[name], list):
        detail = f", it needs a list of {' or '.join(_PICTURES)} and of {' or '.join(_ORDERS)}"
        raise RowError(where, "a record holds no ranking", detail)
    if len(paths) != len(record[name]):
        detail = f", {len(paths)} pictures and {len(record[name])} of {name}"
        raise RowError(where, "pictures and ranks differ in number", detail)
    numbers = [number(value, where, f"the {name}") for value in record[name]]
    return prompt, paths, numbers if _ORDERS[name] else [-value for value in numbers]
