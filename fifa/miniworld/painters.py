"""Stand-ins for image models of different quality: each paints a request in its own faulty way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image as Pillow
from PIL import ImageDraw, ImageFilter

from fifa.images import decode, encode_jpeg, encode_png
from fifa.miniworld import vocabulary as words
from fifa.miniworld.annotators import scene_view
from fifa.miniworld.captions import Group, Request, pick, sample_request
from fifa.miniworld.oracle import View, judge
from fifa.miniworld.scenes import GAP, MARGIN, SIZE, Image, Scene, Thing, compose, render

# Share of the images of a data set that each painter makes; two images of a pair are independent.
PAINTER_SHARES: dict[str, float] = {
    "faithful": 0.28,  # what was asked for, clean
    "sloppy": 0.30,  # one attribute wrong: colour, shape, size, count, relation or background
    "cluttered": 0.10,  # extra things and scraps of lines
    "blurry": 0.08,  # Gaussian blur of 0.5 to 1.2 pixels
    "noisy": 0.08,  # Gaussian noise of 8 to 30 grey levels
    "jpeg": 0.08,  # a JPEG file of quality 20 to 45; all others are lossless PNG files
    "off-topic": 0.08,  # a scene that answers another request
}
MOST_THINGS = 4  # more large things may not fit on a picture


@dataclass(frozen=True)
class Picture:
    """An image file, its pixels as a viewer shows them, and what was really painted (if known)."""

    file: bytes
    pixels: Image
    truth: View | None


def paint(painter: str, request: Request, rng: np.random.Generator) -> Picture:
    """An image for `request` by one of PAINTER_SHARES."""
    scene, pixels, quality = _PAINTERS[painter](request, rng)
    return picture(pixels, scene_view(scene), quality)


def picture(pixels: Image, truth: View | None = None, quality: int | None = None) -> Picture:
    """Store pixels as a JPEG file of the given quality, or without loss as PNG."""
    file = encode_png(pixels) if quality is None else encode_jpeg(pixels, quality)
    return Picture(file, decode(file, "a painted image"), truth)


Painted = tuple[Scene, Image, int | None]  # what was painted, its pixels, the JPEG quality


def _faithful(request: Request, rng: np.random.Generator) -> Painted:
    scene = compose(request, rng)
    return scene, render(scene), None


def _blurry(request: Request, rng: np.random.Generator) -> Painted:
    scene = compose(request, rng)
    soft = ImageFilter.GaussianBlur(float(rng.uniform(0.5, 1.2)))
    return scene, np.asarray(Pillow.fromarray(render(scene)).filter(soft)), None


def _noisy(request: Request, rng: np.random.Generator) -> Painted:
    scene = compose(request, rng)
    noise = rng.normal(0, rng.uniform(8, 30), (SIZE, SIZE, 3))
    return scene, np.clip(np.rint(render(scene) + noise), 0, 255).astype(np.uint8), None


def _jpeg(request: Request, rng: np.random.Generator) -> Painted:
    scene = compose(request, rng)
    return scene, render(scene), int(rng.integers(20, 46))


def _off_topic(request: Request, rng: np.random.Generator) -> Painted:
    return _faithful(sample_request(rng, "train"), rng)


# ---- one attribute wrong -------------------------------------------------------------------------


def _sloppy(request: Request, rng: np.random.Generator) -> Painted:
    """Paint a request that differs in one attribute, until something asked for is missing."""
    while True:
        scene = compose(_altered(request, rng), rng)
        if not judge(scene_view(scene), request).all_hold:
            return scene, render(scene), None


def _altered(request: Request, rng: np.random.Generator) -> Request:
    """The request with one attribute changed that it states."""
    at = int(rng.integers(len(request.groups)))
    group = request.groups[at]
    changed: list[Request] = [_with_group(request, at, g) for g in _altered_groups(group, rng)]
    room = MOST_THINGS - sum(g.count for g in request.groups)
    step = 1 if room > 0 and (group.count == 1 or rng.random() < 0.5) else -1
    if group.count + step > 0:
        changed.append(_with_group(request, at, replace(group, count=group.count + step)))
    if request.relation:
        changed.append(replace(request, relation=_other(rng, words.RELATIONS, request.relation)))
    if request.background:
        other = _other(rng, words.BACKGROUNDS, request.background)
        changed.append(replace(request, background=other))
    return changed[int(rng.integers(len(changed)))]


def _altered_groups(group: Group, rng: np.random.Generator) -> list[Group]:
    groups = [replace(group, shape=_other(rng, words.SHAPES, group.shape))]
    if group.colour:
        groups.append(replace(group, colour=_other(rng, words.COLOURS, group.colour)))
    if group.size:
        groups.append(replace(group, size=_other(rng, words.SIZES, group.size)))
    return groups


def _with_group(request: Request, at: int, group: Group) -> Request:
    return replace(request, groups=(*request.groups[:at], group, *request.groups[at + 1 :]))


def _other(rng: np.random.Generator, table: dict[str, tuple[str, ...]], but: str) -> str:
    return pick(rng, {key: None for key in table if key != but})


# ---- too many things -----------------------------------------------------------------------------


def _cluttered(request: Request, rng: np.random.Generator) -> Painted:
    """A right scene with one to three extras where there is room: things, or scraps of lines."""
    scene = compose(request, rng)
    things = list(scene.things)
    scraps: list[Thing] = []
    for _ in range(int(rng.integers(1, 4))):
        extra = _extra(things + scraps, rng)
        if extra is not None:
            (things if rng.random() < 0.5 else scraps).append(extra)
    scene = replace(scene, things=tuple(things))
    return scene, _with_scraps(render(scene), scraps, rng), None


def _extra(placed: list[Thing], rng: np.random.Generator) -> Thing | None:
    """A small thing that touches nothing; None if no room is found."""
    radius = float(rng.choice(words.RADII["small"]))
    colour = pick(rng, words.COLOURS)
    for _ in range(30):
        x, y = np.round(rng.uniform(radius + MARGIN, SIZE - radius - MARGIN, 2) * 2) / 2
        if all(max(abs(x - t.x), abs(y - t.y)) >= radius + t.radius + GAP for t in placed):
            shape = pick(rng, words.SHAPES)
            return Thing(shape, colour, "small", float(x), float(y), radius, words.RGB[colour])
    return None


def _with_scraps(pixels: Image, scraps: list[Thing], rng: np.random.Generator) -> Image:
    """Draw each scrap as a short stroke, which is no shape of the world, in its place."""
    canvas = Pillow.fromarray(pixels)
    for scrap in scraps:
        angle = rng.uniform(0, np.pi)
        dx, dy = scrap.radius * np.cos(angle), scrap.radius * np.sin(angle)
        ends = (scrap.x - dx, scrap.y - dy, scrap.x + dx, scrap.y + dy)
        ImageDraw.Draw(canvas).line(ends, fill=scrap.rgb, width=3)
    return np.array(canvas)


_PAINTERS: dict[str, Callable[[Request, np.random.Generator], Painted]] = {
    "faithful": _faithful,
    "sloppy": _sloppy,
    "cluttered": _cluttered,
    "blurry": _blurry,
    "noisy": _noisy,
    "jpeg": _jpeg,
    "off-topic": _off_topic,
}
