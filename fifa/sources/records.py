"""Readers of one record a line: JSON lines and CSV, with pictures as paths or base64."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fifa.config import InputError
from fifa.pairs import BadRow, Judgment, Outcome, RowError
from fifa.sources.reading import (
    MAX_RECORD,
    Found,
    ReadOptions,
    existing,
    grouped,
    json_lines,
    lines,
    outcome_of,
    picture,
    set_aside,
    shown,
)

_PROMPTS = ("prompt", "caption", "text")
_WINS = ("chosen", "win", "winner", "img_win", "image_win", "preferred", "good_jpg")
_LOSES = ("rejected", "lose", "loser", "img_lose", "image_lose", "dispreferred", "bad_jpg")
_FIRSTS = ("image_0", "image0", "jpg_0", "image_a", "image1_path", "path1")
_SECONDS = ("image_1", "image1", "jpg_1", "image_b", "image2_path", "path2")
_SINGLES = ("file_path", "image", "image_path", "path", "file_name", "image_0")
_LABELS = ("label", "preference", "choice", "winner_index")
_LABEL_PAIRS = (("label_0", "label_1"), ("prefer_0", "prefer_1"))  # higher is better

_CHOICES: dict[str, Outcome] = {
    "0": "a",
    "0.0": "a",
    "1": "b",
    "1.0": "b",
    "0.5": "tie",
    "a": "a",
    "b": "b",
    "tie": "tie",
    "image_0": "a",
    "image_1": "b",
}
_THUMBS = {
    **dict.fromkeys(("1", "1.0", "true", "up", "good", "like", "win"), True),
    **dict.fromkeys(("thumbs_up", "exclusive_win"), True),
    **dict.fromkeys(("0", "0.0", "-1", "false", "down", "bad", "dislike", "lose"), False),
    **dict.fromkeys(("thumbs_down", "exclusive_lose"), False),
}


def jsonl(path: str, options: ReadOptions) -> Iterator[Found]:
    """JSON lines: prompt with chosen and rejected, or image_0, image_1 and label; paths or base64.

    A label is the number of the better picture (0 or 1), or 0.5 for a tie; label_0 and label_1 are
    Pick-a-Pic's. Names are guessed, or given by `prompt`, `win`, `lose`, `image_0`, ...
    """
    file = existing(path, "a file of JSON lines")
    folder = options.images or file.parent
    for row, where, record in json_lines(file):
        yield _judged(row, where, record, folder, options)


def csv_table(path: str, options: ReadOptions) -> Iterator[Found]:
    """CSV with a header (or .tsv): the columns of `jsonl`."""
    file = existing(path, "a CSV file")
    folder = options.images or file.parent
    for row, where, record in _csv_records(file):
        yield _judged(row, where, record, folder, options)


def invoke_training(path: str, options: ReadOptions) -> Iterator[Found]:
    """invoke-training's folder: metadata.jsonl of prompt, image_0, image_1, prefer_0, prefer_1.

    Equal preferences are a tie.
    """
    root = existing(path, "the folder with metadata.jsonl")
    file = root / "metadata.jsonl" if root.is_dir() else root
    if not file.is_file():
        raise InputError(f"{root} holds no metadata.jsonl")
    return jsonl(str(file), options)


def _judged(row: int, where: str, record: object, folder: Path, options: ReadOptions) -> Found:
    try:
        if isinstance(record, RowError):
            raise record
        if not isinstance(record, Mapping):
            raise RowError(where, "a record is no JSON object", f", it is {shown(record)}")
        return _judgment(record, where, folder, options)
    except RowError as error:
        return set_aside(row, error)


def _judgment(
    record: Mapping[str, Any], where: str, folder: Path, options: ReadOptions
) -> Judgment:
    prompt = _prompt(record, where, options)
    win, lose = _name(record, options.win, _WINS), _name(record, options.lose, _LOSES)
    if win and lose:
        first, second = win, lose
    else:
        first = _name(record, options.image_0, _FIRSTS) or ""
        second = _name(record, options.image_1, _SECONDS) or ""
        if not first or not second:
            detail = f", it has {shown(', '.join(map(str, record)))}"
            raise RowError(where, "the names of the pictures are not known", detail)
    return Judgment(
        prompt=prompt,
        image_a=picture(record[first], folder, where),
        image_b=picture(record[second], folder, where),
        outcome="a" if win and lose else _outcome(record, where, options),
        who=str(record.get("user_id") or ""),
        when=str(record.get("created_at") or ""),
        where=where,
        model_a=str(record.get("model_0") or ""),
        model_b=str(record.get("model_1") or ""),
    )


def _name(record: Mapping[str, Any], given: str | None, guesses: Sequence[str]) -> str | None:
    """The name that was given, or the first guess that the record has."""
    return next((name for name in ([given] if given else guesses) if name in record), None)


def _prompt(record: Mapping[str, Any], where: str, options: ReadOptions) -> str:
    name = _name(record, options.prompt, _PROMPTS)
    prompt = record[name] if name else None
    if not isinstance(prompt, str):
        raise RowError(where, "the prompt is missing or no text", f", it is {shown(prompt)}")
    return prompt


def _outcome(record: Mapping[str, Any], where: str, options: ReadOptions) -> Outcome:
    if not options.label:
        for first, second in _LABEL_PAIRS:
            if first in record and second in record:
                return outcome_of(*(_score(record[name], where) for name in (first, second)))
    name = _name(record, options.label, _LABELS)
    label = record[name] if name else None
    outcome = _CHOICES.get(str(label).strip().lower()) if not isinstance(label, bool) else None
    if outcome is None:
        detail = f", it is {shown(label)}, allowed are {', '.join(_CHOICES)}"
        raise RowError(where, "the label is missing or wrong", detail)
    return outcome


def _score(value: object, where: str) -> float:
    """0, 0.5 or 1, also written as true, false or text."""
    words = {"true": 1.0, "false": 0.0, "1": 1.0, "1.0": 1.0, "0": 0.0, "0.0": 0.0, "0.5": 0.5}
    score = words.get(str(value).strip().lower())
    if score is None:
        detail = f", it is {shown(value)}, allowed are 0, 1, 0.5, true and false"
        raise RowError(where, "the label is missing or wrong", detail)
    return score


# ---- CSV -----------------------------------------------------------------------------------------


def _csv_records(file: Path) -> Iterator[tuple[int, str, Any]]:
    """(number, where, record) of each row; a RowError in place of one that is no row."""
    # The limit is the module's, for pictures in base64; it is only ever raised.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_RECORD))
    table = csv.reader(lines(file), delimiter="\t" if file.suffix == ".tsv" else ",")
    try:
        header = next(table, None)
    except csv.Error as error:
        raise InputError(f"{file}: its header is no CSV, {error}") from None
    if not header:
        raise InputError(f"{file} has no header")
    row = 0
    while True:
        where = f"{file.name} line {table.line_num + 1}"
        try:
            fields = next(table)
        except StopIteration:
            return
        except csv.Error as error:
            yield row, where, RowError(where, "a line is no CSV", f", {error}")
            row += 1
            continue
        if not fields:
            continue
        if len(fields) != len(header):
            detail = f", {len(fields)} in place of {len(header)}"
            yield row, where, RowError(where, "a row has too few or too many fields", detail)
        else:
            yield row, where, dict(zip(header, fields, strict=True))
        row += 1


# ---- single votes --------------------------------------------------------------------------------


def kto(path: str, options: ReadOptions) -> Iterator[Found]:
    """Diffusion-KTO's CSV of single pictures: file_path, caption and label, thumbs up or down.

    Every good picture meets every bad one of the same prompt, at most `max_pairs` of them, spread
    evenly over the good ones. What finds no partner is set aside.
    """
    file = existing(path, "a CSV file")
    folder = options.images or file.parent
    for key, group in grouped(_votes(file, options)):
        if key.startswith(_BAD):
            yield BadRow(**group[0])
        else:
            yield from _paired(key, group, folder, options.max_pairs)


_BAD = "\0"  # begins the key of a row that is no vote; no prompt holds one


def _votes(file: Path, options: ReadOptions) -> Iterator[tuple[str, Any]]:
    """(prompt, [row, where, path, good]) of each vote."""
    for row, where, record in _csv_records(file):
        try:
            if isinstance(record, RowError):
                raise record
            prompt = _prompt(record, where, options)
            if not prompt.strip() or "\0" in prompt:
                raise RowError(where, "the prompt is empty or holds a NUL byte")
            image = _name(record, options.image_0, _SINGLES)
            if image is None:
                raise RowError(where, "the names of the pictures are not known")
            yield prompt, [row, where, record[image], _thumb(record, where, options)]
        except RowError as error:
            yield f"{_BAD}{row}", asdict(set_aside(row, error))


def _thumb(record: Mapping[str, Any], where: str, options: ReadOptions) -> bool:
    name = _name(record, options.label, _LABELS)
    label = record[name] if name else None
    good = _THUMBS.get(str(label).strip().lower())
    if good is None:
        detail = f", it is {shown(label)}, allowed are {', '.join(_THUMBS)}"
        raise RowError(where, "the label is missing or wrong", detail)
    return good


def _paired(
    prompt: str, votes: Sequence[Sequence[Any]], folder: Path, most: int
) -> Iterator[Found]:
    """Good pictures against bad ones; each picture is read for each pair, none is kept."""
    good = [vote for vote in votes if vote[3]]
    bad = [vote for vote in votes if not vote[3]]
    if not good or not bad:
        for row, where, *_ in votes:
            reason = "no picture of the same prompt has the other label"
            yield set_aside(row, RowError(where, reason))
        return
    # Shift by shift every good picture meets another bad one, so that a cut is fair to all.
    for i in range(min(most, len(good) * len(bad))):
        win = good[i % len(good)]
        lose = bad[(i % len(good) + i // len(good)) % len(bad)]
        where = f"{win[1]} against {lose[1]}"
        try:
            images = [picture(vote[2], folder, vote[1]) for vote in (win, lose)]
        except RowError as error:
            yield set_aside(win[0], error)
            continue
        yield Judgment(prompt, images[0], images[1], "a", where=where)
    if (rest := len(good) * len(bad) - most) > 0:
        detail = f", {rest:,} more pairs of {len(good)} good and {len(bad)} bad pictures"
        reason = "a prompt has more pairs than max_pairs"
        yield set_aside(good[0][0], RowError(good[0][1], reason, detail))
