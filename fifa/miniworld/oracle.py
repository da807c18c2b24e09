"""The oracle: which conditions of a prompt hold in an image, by classical vision and no learning.

An image is read as flat things on a backdrop: threshold the distance to the backdrop, take
connected pieces, name each piece's colour by the nearest palette entry and its shape by the best
overlap with the five shapes drawn with the piece's own area and centroid. Conditions are those of
GenEval (object, colour, count, relation; Ghosh et al. 2023, arXiv 2310.11513) plus size,
background, and what a prompt forbids.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from fifa.miniworld import vocabulary as words
from fifa.miniworld.captions import Group, Request, parse
from fifa.miniworld.scenes import INSIDE, Image, shape_mask

Kind = Literal["object", "colour", "size", "count", "relation", "background", "without"]

FOREGROUND = 52.0  # RGB distance from the backdrop at which a pixel belongs to a thing
LEAST_AREA = 9  # pixels; smaller pieces are specks
LEAST_OVERLAP = 0.62  # soft intersection over union below which a piece has no known shape
SECOND_COLOUR = 0.2  # share of a piece beyond which another palette colour makes two things of it
RELATION_OFFSET = 4.0  # pixels between centres


@dataclass(frozen=True)
class Seen:
    """One thing found, its shape None if it is not of the world; x, y are its centre in pixels."""

    shape: str | None
    colour: str
    size: str
    x: float
    y: float
    overlap: float


@dataclass(frozen=True)
class Condition:
    """One checkable statement of a prompt."""

    kind: Kind
    text: str
    holds: bool


@dataclass(frozen=True)
class Verdict:
    """Every condition of a prompt, judged on one image."""

    conditions: tuple[Condition, ...]

    @property
    def all_hold(self) -> bool:
        """Whether the image shows everything that was asked for."""
        return all(c.holds for c in self.conditions)

    @property
    def share(self) -> float:
        """Share of conditions that hold, in [0, 1]."""
        return sum(c.holds for c in self.conditions) / len(self.conditions)


def check(image: Image, prompt: str) -> Verdict:
    """Judge one image (uint8, 32 x 32 x 3) against one prompt.

    Raises:
        UnparsedPrompt: the prompt asks for nothing of the mini world.
    """
    return judge(look(image), parse(prompt))


@dataclass(frozen=True)
class View:
    """What the oracle sees in an image, before any prompt is known."""

    things: tuple[Seen, ...]
    background: str
    residual: float  # mean absolute difference to a flat redrawing of what was seen, grey levels


def look(image: Image) -> View:
    """Find the things in an image (uint8, 32 x 32 x 3)."""
    if image.shape != (words.IMAGE_SIZE, words.IMAGE_SIZE, 3) or image.dtype != np.uint8:
        raise ValueError(
            f"the oracle reads uint8 images of shape (32, 32, 3), got {image.dtype} {image.shape}"
        )
    pixels = image.astype(np.float32)
    backdrop = _backdrop(image)
    redrawn = np.empty_like(pixels)
    redrawn[:] = backdrop
    foreground = ((pixels - backdrop) ** 2).sum(2) > FOREGROUND**2
    things = tuple(
        _identify(pixels, piece, backdrop, redrawn) for piece in _pieces(pixels, foreground)
    )
    residual = float(np.abs(pixels - redrawn).mean())
    return View(things, _BACKGROUNDS[_nearest(backdrop, _BACKGROUND_RGB)], residual)


def judge(view: View, request: Request) -> Verdict:
    """Every condition of a request against what was seen."""
    conditions = [c for group in request.groups for c in _group_conditions(group, view)]
    if request.relation is not None:
        conditions.append(_relation_condition(request, view))
    if request.background is not None:
        holds = view.background == request.background
        conditions.append(Condition("background", request.background, holds))
    if request.without is not None:
        holds = not any(matches(thing, request.without) for thing in view.things)
        banned = f"no {request.without.colour or ''} {request.without.shape}".replace("  ", " ")
        conditions.append(Condition("without", banned, holds))
    return Verdict(tuple(conditions))


def neatness(image: Image) -> float:
    """How much of an image is clean things on a clean backdrop, in (0, 1]; knows no prompt.

    Falls with noise, compression dirt, texture, misshapen or speckled things: exp(-residual / 6
    grey levels), halved for each thing of no known shape. Blur costs little while shapes are known.
    """
    return view_neatness(look(image))


def view_neatness(view: View) -> float:
    """`neatness` of an image that was looked at already."""
    unknown = sum(thing.shape is None for thing in view.things)
    return float(np.exp(-view.residual / 6) * 0.5**unknown)


def _group_conditions(group: Group, view: View) -> list[Condition]:
    """Each attribute narrows the set of candidates; the count is that of the whole description."""
    described = [thing for thing in view.things if thing.shape == group.shape]
    conditions = [Condition("object", group.shape, bool(described))]
    if group.colour:
        described = [thing for thing in described if thing.colour == group.colour]
        conditions.append(Condition("colour", f"{group.colour} {group.shape}", bool(described)))
    if group.size:
        described = [thing for thing in described if thing.size == group.size]
        conditions.append(Condition("size", f"{group.size} {group.shape}", bool(described)))
    conditions.append(
        Condition("count", f"{group.count} x {group.shape}", len(described) == group.count)
    )
    return conditions


def matches(thing: Seen, group: Group) -> bool:
    """Whether a thing fits a group's description."""
    return (
        thing.shape == group.shape
        and group.colour in (None, thing.colour)
        and group.size in (None, thing.size)
    )


def _relation_condition(request: Request, view: View) -> Condition:
    first, second = (
        [thing for thing in view.things if matches(thing, group)] for group in request.groups
    )
    holds = any(_stands(a, b, cast(str, request.relation)) for a in first for b in second)
    return Condition("relation", cast(str, request.relation), holds)


def _stands(a: Seen, b: Seen, relation: str) -> bool:
    """Whether `a` stands in `relation` to `b`."""
    offset = {
        "left of": b.x - a.x,
        "right of": a.x - b.x,
        "above": b.y - a.y,
        "below": a.y - b.y,
    }[relation]
    return a is not b and offset >= RELATION_OFFSET


def _backdrop(image: Image) -> NDArray[np.float32]:
    """The backdrop's colour: the median of the frame; objects keep two pixels away from it."""
    frame = np.concatenate(
        [
            image[:2].reshape(-1, 3),
            image[-2:].reshape(-1, 3),
            image[2:-2, [0, 1, -2, -1]].reshape(-1, 3),
        ]
    )
    frame.sort(axis=0)  # of bytes, several times faster than np.median of floats
    middle = len(frame) // 2
    return frame[middle - 1 : middle + 1].mean(axis=0, dtype=np.float32)


@dataclass(frozen=True)
class Piece:
    """A connected piece of foreground: a window of the image with an empty rim, and the mask in it.

    All work on a piece stays inside its window, which costs a tenth of the whole image. The rim is
    missing only where the window meets the frame of the image.
    """

    window: tuple[slice, slice]
    mask: NDArray[np.bool_]


def _pieces(pixels: NDArray[np.float32], foreground: NDArray[np.bool_]) -> list[Piece]:
    """Connected pieces of the foreground; a piece of two colours is two pieces."""
    pieces = []
    for piece in _connected(foreground, (slice(None), slice(None))):
        named = _palette_index(pixels[piece.window][piece.mask])
        shares = np.bincount(named, minlength=len(_COLOURS)) / len(named)
        major = np.flatnonzero(shares >= SECOND_COLOUR)
        if len(major) < 2 or not _apart(pixels, piece, major):
            pieces.append(piece)
            continue
        for colour in major:
            part = np.zeros_like(piece.mask)
            part[piece.mask] = named == colour
            pieces += _connected(part, piece.window)
    return pieces


def _connected(mask: NDArray[np.bool_], window: tuple[slice, slice]) -> list[Piece]:
    """The connected parts, specks left out, of a mask that covers `window` of the image."""
    from scipy import ndimage

    top, left = window[0].start or 0, window[1].start or 0
    labels, _ = ndimage.label(mask)
    pieces = []
    for label, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
        rim = (
            slice(max(rows.start - 1, 0), min(rows.stop + 1, mask.shape[0])),
            slice(max(columns.start - 1, 0), min(columns.stop + 1, mask.shape[1])),
        )
        own = labels[rim] == label
        if np.count_nonzero(own) >= LEAST_AREA:
            in_image = (
                slice(rim[0].start + top, rim[0].stop + top),
                slice(rim[1].start + left, rim[1].stop + left),
            )
            pieces.append(Piece(in_image, own))
    return pieces


def _eroded(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The pixels whose four neighbours are set too; outside the array nothing is set."""
    inner = np.zeros_like(mask)
    inner[1:-1, 1:-1] = (
        mask[1:-1, 1:-1] & mask[:-2, 1:-1] & mask[2:, 1:-1] & mask[1:-1, :-2] & mask[1:-1, 2:]
    )
    return inner


def _dilated(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The pixels that are set or have one of four neighbours set."""
    outer = mask.copy()
    outer[1:] |= mask[:-1]
    outer[:-1] |= mask[1:]
    outer[:, 1:] |= mask[:, :-1]
    outer[:, :-1] |= mask[:, 1:]
    return outer


def _apart(pixels: NDArray[np.float32], piece: Piece, major: NDArray[np.intp]) -> bool:
    """Whether the colours of a piece survive erosion: only edges blend into false colours."""
    named = _palette_index(pixels[piece.window][_eroded(piece.mask)])
    if not len(named):
        return False
    shares = np.bincount(named, minlength=len(_COLOURS)) / len(named)
    return int((shares[major] >= SECOND_COLOUR).sum()) >= 2


def _identify(
    pixels: NDArray[np.float32],
    piece: Piece,
    backdrop: NDArray[np.float32],
    redrawn: NDArray[np.float32],
) -> Seen:
    """Name one piece, and paint it flat into `redrawn`."""
    inside = pixels[piece.window]
    interior = _eroded(piece.mask)
    solid = inside[interior if np.count_nonzero(interior) >= 6 else piece.mask]
    rgb = np.median(solid, axis=0).astype(np.float32)
    direction = rgb - backdrop
    cover = np.clip((inside - backdrop) @ direction / (direction @ direction), 0, 1)
    cover *= _dilated(piece.mask)
    area = float(cover.sum())
    y = float(cover.sum(1) @ _CENTRES[piece.window[0]]) / area
    x = float(cover.sum(0) @ _CENTRES[piece.window[1]]) / area
    fits = {shape: _fit(cover, piece.window, shape, area, x, y) for shape in INSIDE}
    best = max(fits, key=lambda shape: fits[shape])
    flat = redrawn[piece.window]
    flat += cover[..., None] * (rgb - flat)
    return Seen(
        shape=best if fits[best] >= LEAST_OVERLAP else None,
        colour=_COLOURS[_nearest(rgb, _COLOUR_RGB)],
        size="large" if _radius(best, area) > words.SIZE_BOUNDARY else "small",
        x=x,
        y=y,
        overlap=fits[best],
    )


def _radius(shape: str, area: float) -> float:
    return float(np.sqrt(area / _unit(shape)[0]))


def _fit(
    cover: NDArray[np.floating[Any]],
    window: tuple[slice, slice],
    shape: str,
    area: float,
    x: float,
    y: float,
) -> float:
    """Soft intersection over union with the shape of equal area and centroid."""
    radius = round(_radius(shape, area) * 4) / 4
    _, u, v = _unit(shape)
    cx, cy = x - u * radius, y - v * radius
    left, top = int(np.floor(cx - radius)) - 1, int(np.floor(cy - radius)) - 1
    at = (round((cx - left) * 4) / 4, round((cy - top) * 4) / 4)
    mask, drawn = _template(shape, radius, *at)
    if min(top, left) < 0 or max(top, left) + len(mask) > words.IMAGE_SIZE:
        drawn = float(_common(mask, top, left, _FRAME)[0].sum())
    here, (rows, columns) = _common(mask, top, left, window)
    both = float(np.minimum(cover[rows, columns], here).sum())
    return both / (area + drawn - both)


@lru_cache(maxsize=4096)
def _template(shape: str, radius: float, cx: float, cy: float) -> tuple[NDArray[np.float32], float]:
    """A shape's mask (S, S) and its area in pixels."""
    mask = shape_mask(shape, radius, cx, cy)
    return mask, float(mask.sum())


def _common(
    mask: NDArray[np.float32], top: int, left: int, window: tuple[slice, slice]
) -> tuple[NDArray[np.float32], tuple[slice, slice]]:
    """The part of a mask placed at (top, left) that lies in `window`, and where in the window."""
    spans = []
    for start, length, span in ((top, len(mask), window[0]), (left, mask.shape[1], window[1])):
        first = max(start, span.start)
        spans.append((first, max(first, min(start + length, span.stop))))
    (first_row, last_row), (first_column, last_column) = spans
    part = mask[first_row - top : last_row - top, first_column - left : last_column - left]
    rows = slice(first_row - window[0].start, last_row - window[0].start)
    columns = slice(first_column - window[1].start, last_column - window[1].start)
    return part, (rows, columns)


@lru_cache(maxsize=8)
def _unit(shape: str) -> tuple[float, float, float]:
    """Area and centroid (area, u, v) of a shape of radius 1 at the origin."""
    at = (np.arange(1000) + 0.5) / 500 * 1.1 - 1.1
    inside = INSIDE[shape](at[None, :] * np.ones((1000, 1)), at[:, None] * np.ones((1, 1000)))
    u, v = (at[None, :] * inside).sum() / inside.sum(), (at[:, None] * inside).sum() / inside.sum()
    return float(inside.sum()) * (2.2 / 1000) ** 2, float(u), float(v)


_CENTRES = np.arange(words.IMAGE_SIZE, dtype=np.float32) + 0.5  # of pixels, along one axis
_FRAME = (slice(0, words.IMAGE_SIZE), slice(0, words.IMAGE_SIZE))
_COLOURS = tuple(words.RGB)
_BACKGROUNDS = tuple(words.BACKGROUND_RGB)
_COLOUR_RGB = np.array(list(words.RGB.values()), np.float32)
_BACKGROUND_RGB = np.array(list(words.BACKGROUND_RGB.values()), np.float32)


def _nearest(rgb: NDArray[np.float32], palette: NDArray[np.float32]) -> int:
    """Index of the palette colour (K, 3) nearest to one colour (3,)."""
    return int(((palette - rgb) ** 2).sum(1).argmin())


def _palette_index(rgb: NDArray[np.float32]) -> NDArray[np.intp]:
    """Index of the nearest object colour for each row of (N, 3)."""
    # |rgb|^2 is the same for every candidate; the rest is exact in float32, so ties stay ties
    return ((_COLOUR_RGB**2).sum(1) - 2 * (rgb @ _COLOUR_RGB.T)).argmin(1)
