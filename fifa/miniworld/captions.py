"""What a prompt asks for, as a value: sampled, put into words, and read back from words.

A `Request` is the meaning of a prompt; `phrase` words it (synonyms, paraphrases) and `parse`
recovers it: `parse(phrase(request, rng)) == request` for every request and every wording.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal, TypeVar

import numpy as np

from fifa.config import InputError
from fifa.miniworld import vocabulary as words

Split = Literal["train", "heldout"]
HELD_OUT_SHARE = 0.1
T = TypeVar("T")


class UnparsedPrompt(InputError):
    """The prompt asks for nothing that exists in the mini world."""


@dataclass(frozen=True, order=True)
class Group:
    """`count` objects of one shape;

    `colour` and `size` are None where the prompt leaves them open.
    """

    shape: str
    colour: str | None = None
    size: str | None = None
    count: int = 1


@dataclass(frozen=True)
class Request:
    """The meaning of a prompt:

    groups of objects, a relation from the first to the second, a background, and what must not be
    seen. `sample_request` draws no such ban; `without` is for tests of what a reward understands.
    """

    groups: tuple[Group, ...]
    relation: str | None = None
    background: str | None = None
    without: Group | None = None  # of no count: not one thing may fit its description

    @property
    def key(self) -> str:
        """One spelling for all wordings of one meaning."""
        groups = self.groups if self.relation else tuple(sorted(self.groups, key=str))
        banned = f"|without {self.without}" if self.without else ""
        return f"{groups}|{self.relation}|{self.background}{banned}"

    @property
    def split(self) -> Split:
        """Held out by meaning, so that no paraphrase of a held-out prompt is ever trained on."""
        bucket = int.from_bytes(blake2b(self.key.encode(), digest_size=4).digest(), "big") / 2**32
        return "heldout" if bucket < HELD_OUT_SHARE else "train"


def sample_request(rng: np.random.Generator, split: Split | None = None) -> Request:
    """Draw what a prompt asks for:

    1-4 objects in one or two groups, from `split` (None: either).
    """
    while True:
        request = _draw_request(rng)
        if split is None or request.split == split:
            return request


def _draw_request(rng: np.random.Generator) -> Request:
    kind = rng.choice(5, p=[0.3, 0.2, 0.2, 0.2, 0.1])
    background = pick(rng, words.BACKGROUNDS) if rng.random() < 0.2 else None
    if kind == 0:
        return Request((_draw_group(rng, 1),), None, background)
    if kind == 1:
        return Request((_draw_group(rng, int(rng.integers(2, 5))),), None, background)
    counts = (1, 1) if kind < 4 else ((2, 1), (1, 2), (3, 1), (2, 2))[rng.integers(4)]
    first, second = _draw_group(rng, counts[0]), _draw_group(rng, counts[1])
    while not _exclusive(first, second):
        second = _draw_group(rng, counts[1])
    relation = pick(rng, words.RELATIONS) if kind == 3 else None
    return Request((first, second), relation, background)


def _draw_group(rng: np.random.Generator, count: int) -> Group:
    colour = pick(rng, words.COLOURS) if rng.random() < 0.85 else None
    size = pick(rng, words.SIZES) if rng.random() < 0.25 else None
    return Group(pick(rng, words.SHAPES), colour, size, count)


def _exclusive(a: Group, b: Group) -> bool:
    """No object can belong to both groups, so that counts have one meaning."""
    both_coloured = a.colour is not None and b.colour is not None
    return a.shape != b.shape or (both_coloured and a.colour != b.colour)


def pick(rng: np.random.Generator, table: Mapping[T, object]) -> T:
    """One key of `table`, uniformly."""
    return list(table)[int(rng.integers(len(table)))]


def phrase(request: Request, rng: np.random.Generator) -> str:
    """Word a request; the same request has hundreds of wordings."""
    groups = list(request.groups)
    if request.relation is None and len(groups) == 2 and rng.random() < 0.5:
        groups.reverse()
    joint = " and " if rng.random() < 0.7 else " with "
    if request.relation is not None:
        joint = f" {_any(rng, words.RELATIONS[request.relation])} "
    text = joint.join(_noun_phrase(group, rng) for group in groups)
    opening = _any(rng, words.OPENINGS)
    text = f"{opening} {text}" if opening else text
    if request.background is not None:
        colour = _any(rng, words.BACKGROUNDS[request.background])
        text = f"{text} {_any(rng, words.SETTINGS).format(colour)}"
    if request.without is not None:
        banned = [_any(rng, words.SHAPES[request.without.shape])]
        banned[0] = _plural(banned[0])
        if request.without.colour:
            banned.insert(0, _any(rng, words.COLOURS[request.without.colour]))
        text = f"{text} {_any(rng, words.BANS)} {' '.join(banned)}"
    return text


def _any(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]


def _noun_phrase(group: Group, rng: np.random.Generator) -> str:
    parts = [_any(rng, words.COUNTS[group.count])]
    if group.size:
        parts.append(_any(rng, words.SIZES[group.size]))
    if group.colour:
        parts.append(_any(rng, words.COLOURS[group.colour]))
    noun = _any(rng, words.SHAPES[group.shape])
    parts.append(_plural(noun) if group.count > 1 else noun)
    if parts[0] == "a" and parts[1][0] in "aeiou":
        parts[0] = "an"
    return " ".join(parts)


def _plural(noun: str) -> str:
    return noun + ("es" if noun.endswith(("s", "x")) else "s")


def _alternatives(spellings: Iterator[str]) -> str:
    return "|".join(sorted(map(re.escape, spellings), key=len, reverse=True))


def _spellings(table: Mapping[T, tuple[str, ...]]) -> dict[str, T]:
    return {spelling: key for key, options in table.items() for spelling in options}


_COUNT = {**_spellings(words.COUNTS), "an": 1, "1": 1, "single": 1, "pair of": 2}
_SIZE = _spellings(words.SIZES)
_COLOUR = _spellings(words.COLOURS)
_SHAPE = _spellings(words.SHAPES)
_SHAPE |= {_plural(noun): shape for noun, shape in _SHAPE.items()}
_RELATION = _spellings(words.RELATIONS)
_BACKGROUND = _spellings(words.BACKGROUNDS)
_GROUP_PATTERN = re.compile(
    rf"\b(?:(?P<count>{_alternatives(iter(_COUNT))}) )?(?:(?P<size>{_alternatives(iter(_SIZE))}) )?"
    rf"(?:(?P<colour>{_alternatives(iter(_COLOUR))}) )?(?P<shape>{_alternatives(iter(_SHAPE))})\b"
)
_BAN_PATTERN = re.compile(
    rf"\b(?:{_alternatives(iter(words.BANS))}) (?:(?P<colour>{_alternatives(iter(_COLOUR))}) )?"
    rf"(?P<shape>{_alternatives(iter(_SHAPE))})\b"
)
_RELATION_PATTERN = re.compile(rf"\b(?:{_alternatives(iter(_RELATION))})\b")
_BACKGROUND_PATTERN = re.compile(
    rf"\b(?P<colour>{_alternatives(iter(_BACKGROUND))}) (?:background|backdrop|canvas)\b"
)


def parse(prompt: str) -> Request:
    """Read a prompt's meaning; words outside the grammar are ignored, as a person would.

    Raises:
        UnparsedPrompt: no shape of the mini world is named.
    """
    text = " ".join(re.sub(r"[^a-z0-9 ]", " ", prompt.lower()).split())
    ban = _BAN_PATTERN.search(text)
    text = _BAN_PATTERN.sub(" ", text)
    found = list(_GROUP_PATTERN.finditer(text))
    if not found:
        raise UnparsedPrompt(
            f"prompt {prompt[:80]!r} names nothing of the mini world; "
            f"its shapes are {', '.join(words.SHAPES)}"
        )
    groups = tuple(_read_group(match) for match in found)
    relation = None
    if len(found) == 2:
        between = _RELATION_PATTERN.search(text, found[0].end(), found[1].start())
        relation = _RELATION[between.group()] if between else None
    setting = _BACKGROUND_PATTERN.search(text)
    background = _BACKGROUND[setting["colour"]] if setting else None
    without = Group(_SHAPE[ban["shape"]], _COLOUR.get(ban["colour"])) if ban else None
    ordered = groups if relation else tuple(sorted(groups, key=str))
    return Request(ordered, relation, background, without)


def _read_group(match: re.Match[str]) -> Group:
    return Group(
        shape=_SHAPE[match["shape"]],
        colour=_COLOUR[match["colour"]] if match["colour"] else None,
        size=_SIZE[match["size"]] if match["size"] else None,
        count=_COUNT[match["count"]] if match["count"] else 1,
    )


def prompts(split: Split, n: int, seed: int = 0) -> list[str]:
    """`n` prompts with distinct meanings from one split;

    a longer list begins with the shorter one.
    """
    rng = np.random.default_rng([seed, split == "heldout"])
    seen: dict[str, str] = {}
    while len(seen) < n:
        request = sample_request(rng, split)
        wording = phrase(request, rng)
        seen.setdefault(request.key, wording)
    return list(seen.values())
