"""Readers of two folders of pictures with equal names: `w` holds the winners, `l` the losers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fifa.config import InputError
from fifa.pairs import Judgment, RowError
from fifa.sources.reading import (
    MAX_CAPTION,
    Found,
    ReadOptions,
    existing,
    grouped,
    lines,
    picture,
    set_aside,
)

_SIDES = (("w", "l"), ("win", "lose"))
_PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"}
_CAPTIONS = (".txt", ".caption")


def folders(path: str, options: ReadOptions) -> Iterator[Found]:
    """Folders `w/` and `l/` (or win/, lose/) with equal names, the prompt in NAME.txt beside one.

    The endings of the pictures may differ. `prompts` names a file of NAME, tab, prompt instead; one
    called prompts.txt in the folder is found.
    """
    root = existing(path, "a folder that holds the folders w and l")
    sides = _sides(root)
    if sides is None:
        raise InputError(f"{root} does not hold the folders w and l (or win and lose)")
    for row, found in enumerate(_pairs(root, sides, options, "")):
        yield set_aside(row, found) if isinstance(found, RowError) else found


def sd_scripts(path: str, options: ReadOptions) -> Iterator[Found]:
    """sd-scripts' preference subsets: folders like `10_cat/` with w/ and l/, captions beside.

    A caption is NAME.caption or NAME.txt. Where there is none, the folder's name after the number
    is the prompt, as in DreamBooth; the number of repeats is not used.
    """
    root = existing(path, "a folder of subsets, each with the folders w and l")
    inside = sorted(item for item in root.iterdir() if item.is_dir()) if root.is_dir() else []
    subsets = [subset for subset in (root, *inside) if _sides(subset)]
    if not subsets:
        raise InputError(f"{root} holds no folder with the folders w and l")
    row = 0
    for subset in subsets:
        sides = _sides(subset) or ("", "")
        repeats, _, name = subset.name.partition("_")
        for found in _pairs(subset, sides, options, name if repeats.isdigit() else ""):
            yield set_aside(row, found) if isinstance(found, RowError) else found
            row += 1


def _sides(root: Path) -> tuple[str, str] | None:
    return next((sides for sides in _SIDES if all((root / side).is_dir() for side in sides)), None)


def _pairs(
    root: Path, sides: tuple[str, str], options: ReadOptions, otherwise: str
) -> Iterator[Judgment | RowError]:
    """The pairs of one folder by name; `otherwise` is the prompt of those without a caption."""
    for name, found in grouped(_names(root, sides, options), by_name=True):
        where = f"{root.name}/{name}"
        files = dict(found)
        try:
            if len(files) < len(found):
                raise RowError(where, "a name stands for more than one picture or prompt")
            missing = [side for side in sides if side not in files]
            if len(missing) == 2:
                raise RowError(where, "a prompt has no pictures")
            if missing:
                raise RowError(where, "a picture has no partner", f" in {missing[0]}/")
            prompt = files.get("prompt") or _caption(root, sides, name) or otherwise
            images = [picture(os.path.join(side, files[side]), root, where) for side in sides]
        except RowError as error:
            yield error
            continue
        yield Judgment(prompt, images[0], images[1], "a", where=where)


def _names(root: Path, sides: tuple[str, str], options: ReadOptions) -> Iterator[tuple[str, Any]]:
    """(name, [side, file]) of every picture and (name, ["prompt", text]) of a file of prompts."""
    prompts = options.prompts or root / "prompts.txt"
    if options.prompts or prompts.is_file():
        for line in lines(prompts):
            name, tab, text = line.rstrip("\r\n").partition("\t")
            if tab:
                stem, ending = os.path.splitext(name)
                yield stem if ending.lower() in _PICTURES else name, ["prompt", text]
    for side in sides:
        with os.scandir(root / side) as entries:
            for entry in entries:
                stem, ending = os.path.splitext(entry.name)
                if ending.lower() in _PICTURES and not stem.startswith("."):
                    yield stem, [side, entry.name]


def _caption(root: Path, sides: tuple[str, str], name: str) -> str:
    """The text of the first caption file there is, without white space at its ends."""
    for side in sides:
        for ending in _CAPTIONS:
            file = root / side / f"{name}{ending}"
            if file.is_file():
                with file.open("rb") as text:
                    return text.read(MAX_CAPTION).decode("utf-8", "surrogateescape").strip()
    return ""
