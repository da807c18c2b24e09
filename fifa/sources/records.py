"""Readers of one record a line: JSON lines and CSV, with pictures as paths or base64."""

from __future__ import annotations

import csv
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from fifa.config import InputError
from fifa.pairs import BadRow, Judgment, Outcome, RowError, known
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
_TIES = ("tie", "is_tie")
_USERS = ("user_id", "annotator_id", "worker_id", "user", "annotator", "worker")
_LABEL_PAIRS = (("label_0", "label_1"), ("prefer_0", "prefer_1"))  # higher is better

_TIES_AND_LETTERS: dict[str, Outcome] = {"0.5": "tie", "tie": "tie", "a": "a", "b": "b"}
_FROM_ZERO: dict[str, Outcome] = {
    **dict.fromkeys(("0", "0.0", "image_0"), "a"),
    **dict.fromkeys(("1", "1.0", "image_1"), "b"),
    **_TIES_AND_LETTERS,
}
_FROM_ONE: dict[str, Outcome] = {
    **dict.fromkeys(("1", "1.0", "image_1"), "a"),
    **dict.fromkeys(("2", "2.0", "image_2"), "b"),
    **_TIES_AND_LETTERS,
}
_THUMBS = {
    **dict.fromkeys(("1", "1.0", "true", "up", "good", "like", "win"), True),
    **dict.fromkeys(("thumbs_up", "exclusive_win"), True),
    **dict.fromkeys(("0", "0.0", "-1", "false", "down", "bad", "dislike", "lose"), False),
    **dict.fromkeys(("thumbs_down", "exclusive_lose"), False),
}


def jsonl(path: str, options: ReadOptions) -> Iterator[Found]:
    """JSON lines: prompt with chosen and rejected, or image_0, image_1 and label; paths or base64.

    A label is the number of the better picture (0 or 1; 1 or 2 beside image1_path and image2_path),
    or 0.5 for a tie; label_0 and label_1 are Pick-a-Pic's; beside chosen and rejected a tie may be
    told by `tie`. Who judged is in user_id or the like. Names are guessed, or given by `prompt`,
    `win`, `lose`, `tie`, `user`, `image_0`, ..., which go before guesses.
    """
    file = existing(path, "a file of JSON lines")
    folder = options.images or file.parent
    for row, where, record in json_lines(file):
        yield _judged(row, where, record, folder, options)


def csv_table(path: str, options: ReadOptions) -> Iterator[Found]:
    """CSV with a header (or .tsv): the columns of `jsonl`."""
    file = existing(path, "a CSV file")
    folder = options.images or file.parent
    header, records = _csv(file)
    _columns(header, file.name, options)
    for row, where, record in records:
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
    columns = _columns(record, where, options)
    return Judgment(
        prompt=_prompt(record[columns.prompt], where),
        image_a=picture(record[columns.first], folder, where),
        image_b=picture(record[columns.second], folder, where),
        outcome=_outcome(record, columns, where, options),
        who=known(record.get(columns.user or "")),
        when=known(record.get("created_at")),
        where=where,
        model_a=str(record.get("model_0") or ""),
        model_b=str(record.get("model_1") or ""),
    )


def _prompt(prompt: object, where: str) -> str:
    if not isinstance(prompt, str):
        raise RowError(where, "the prompt is missing or no text", f", it is {shown(prompt)}")
    return prompt


# ---- names of columns ----------------------------------------------------------------------------


class _Columns(NamedTuple):
    """What the columns of a pair are called."""

    prompt: str
    first: str  # picture
    second: str
    labels: tuple[str, ...]  # one, or two of which the higher wins; none where the first has won
    tie: str | None  # says that the first has not won after all
    user: str | None


def _columns(names: Collection[str], where: str, options: ReadOptions) -> _Columns:
    """The columns that were given or can be guessed; RowError that lists those that there are."""
    ordered = bool(options.win or options.lose)
    labelled = bool(options.image_0 or options.image_1 or options.label)
    if ordered and labelled:
        raise InputError("give win and lose, or image_0, image_1 and label, not both")
    prompt = _needed(names, options.prompt, _PROMPTS, where, "the prompt is missing or no text")
    user = _name(names, options.user, _USERS, where)
    win = _name(names, options.win, _WINS, where)
    lose = _name(names, options.lose, _LOSES, where)
    if win and lose and not labelled:
        return _Columns(prompt, win, lose, (), _name(names, options.tie, _TIES, where), user)
    if options.tie:
        raise InputError("tie goes with win and lose; a label says itself that there is one")
    first = _name(names, options.image_0, _FIRSTS, where)
    second = _name(names, options.image_1, _SECONDS, where)
    if not first or not second or ordered:
        detail = f", it has {_listed(names)}"
        raise RowError(where, "the names of the pictures are not known", detail)
    for pair in _LABEL_PAIRS:
        if not options.label and all(name in names for name in pair):
            return _Columns(prompt, first, second, pair, None, user)
    label = _needed(names, options.label, _LABELS, where, "the label is missing or wrong")
    return _Columns(prompt, first, second, (label,), None, user)


def _name(
    names: Collection[str], given: str | None, guesses: Sequence[str], where: str
) -> str | None:
    """The name that was given, which must be there, or the first guess that is."""
    if given is not None and given not in names:
        detail = f", there is no '{given}', it has {_listed(names)}"
        raise RowError(where, "a column that was given is missing", detail)
    return given or next((name for name in guesses if name in names), None)


def _needed(
    names: Collection[str], given: str | None, guesses: Sequence[str], where: str, kind: str
) -> str:
    """The name that was given or guessed; RowError of this kind if there is none."""
    name = _name(names, given, guesses, where)
    if name is None:
        detail = f", no column is called {' or '.join(guesses)}, it has {_listed(names)}"
        raise RowError(where, kind, detail)
    return name


def _listed(names: Collection[str]) -> str:
    return shown(", ".join(names))


# ---- labels --------------------------------------------------------------------------------------


def _outcome(
    record: Mapping[str, Any], columns: _Columns, where: str, options: ReadOptions
) -> Outcome:
    values = [record[name] for name in columns.labels]
    if not values:
        return "tie" if columns.tie and _score(record[columns.tie] or 0, where) > 0 else "a"
    if len(values) == 2:
        return outcome_of(*(_score(value, where) for value in values))
    guessed = not (options.image_0 or options.image_1)
    return _choice(values[0], columns, guessed, where)


def _choice(label: object, columns: _Columns, guessed: bool, where: str) -> Outcome:
    """Which picture a single label names: from 0, or from 1 where guessed names do so.

    A 1 means another picture in each, so a label that only the other knows ends the conversion.
    """
    first, second = columns.first, columns.second
    names_from_one = first != second and first.replace("1", "2") == second
    choices, other = (
        (_FROM_ONE, _FROM_ZERO) if names_from_one and guessed else (_FROM_ZERO, _FROM_ONE)
    )
    word = str(label).strip().lower()
    if word in choices:
        return choices[word]
    if names_from_one and word in other:
        way = (
            f"for labels 0 and 1 give image_0={first} and image_1={second}"
            if guessed
            else "labels 1 and 2 need columns called image1_path and image2_path that are not given"
        )
        raise InputError(f"{where}: the label is {word}, allowed are {', '.join(choices)}; {way}")
    detail = f", it is {shown(label)}, allowed are {', '.join(choices)}"
    raise RowError(where, "the label is missing or wrong", detail)


def _score(value: object, where: str) -> float:
    """0, 0.5 or 1, also written as true, false or text."""
    words = {"true": 1.0, "false": 0.0, "1": 1.0, "1.0": 1.0, "0": 0.0, "0.0": 0.0, "0.5": 0.5}
    score = words.get(str(value).strip().lower())
    if score is None:
        detail = f", it is {shown(value)}, allowed are 0, 1, 0.5, true and false"
        raise RowError(where, "the label is missing or wrong", detail)
    return score


# ---- CSV -----------------------------------------------------------------------------------------


def _csv(file: Path) -> tuple[list[str], Iterator[tuple[int, str, Any]]]:
    """The names of the columns and (number, where, record) of each row.

    The delimiter is that which gives the header most fields; blanks around names do not count. A
    RowError comes in place of a row that is none.
    """
    # The limit is the module's, for pictures in base64; it is only ever raised.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_RECORD))
    rest = lines(file)
    first = next(rest, "")
    if "\r" in first.rstrip("\r\n"):
        raise InputError(f"{file}: its lines end in CR alone, they must end in LF or CR LF")
    usual = "\t" if file.suffix == ".tsv" else ","
    delimiter = max((usual, ",", ";", "\t"), key=lambda mark: _fields(first, mark))
    padded = f"{delimiter} " in first
    table = csv.reader(chain([first], rest), delimiter=delimiter, skipinitialspace=padded)
    try:
        header = next(table, None)
    except csv.Error as error:
        raise InputError(f"{file}: its header is no CSV, {error}") from None
    if not header:
        raise InputError(f"{file} has no header")
    header = [name.strip() for name in header]
    return header, _csv_records(file.name, header, table)


def _fields(line: str, delimiter: str) -> int:
    try:
        return len(next(csv.reader([line], delimiter=delimiter), []))
    except csv.Error:
        return 0


def _csv_records(name: str, header: Sequence[str], table: Any) -> Iterator[tuple[int, str, Any]]:
    row = 0
    while True:
        where = f"{name} line {table.line_num + 1}"
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
    header, records = _csv(file)
    kind = "the prompt is missing or no text"
    text = _needed(header, options.prompt, _PROMPTS, file.name, kind)
    kind = "the names of the pictures are not known"
    image = _needed(header, options.image_0, _SINGLES, file.name, kind)
    label = _needed(header, options.label, _LABELS, file.name, "the label is missing or wrong")
    for row, where, record in records:
        try:
            if isinstance(record, RowError):
                raise record
            prompt = record[text]
            if not prompt.strip() or "\0" in prompt:
                raise RowError(where, "the prompt is empty or holds a NUL byte")
            yield prompt, [row, where, record[image], _thumb(record[label], where)]
        except RowError as error:
            yield f"{_BAD}{row}", asdict(set_aside(row, error))


def _thumb(label: str, where: str) -> bool:
    good = _THUMBS.get(label.strip().lower())
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
