"""From a request to pixels: a `Scene` places exactly what was asked for, `render` paints it.

Deterministic in the generator; about a thousand scenes a second and core.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import cast

import numpy as np
from numpy.typing import NDArray

from fifa.miniworld import vocabulary as words
from fifa.miniworld.captions import Group, Request, pick, sample_request

Image = NDArray[np.uint8]  # (32, 32, 3)
SIZE = words.IMAGE_SIZE
GAP = 2.0  # least pixels between two bounding boxes
MARGIN = 1.0  # least pixels between a bounding box and the frame
RELATION_OFFSET = 9.0  # least distance of centres along the axis of a relation
TEXTURES = ("plain", "stripes", "checks", "dots", "gradient")


@dataclass(frozen=True)
class Thing:
    """One object:

    centre (x, y) and radius (half the bounding box) in pixels, and its exact colour.
    """

    shape: str
    colour: str
    size: str
    x: float
    y: float
    radius: float
    rgb: tuple[int, int, int]


@dataclass(frozen=True)
class Scene:
    """A background and the things on it."""

    things: tuple[Thing, ...]
    background: str
    background_rgb: tuple[int, int, int]
    texture: str
    texture_strength: float  # peak deviation from the background, grey levels
    texture_period: int  # pixels


def sample_scene(rng: np.random.Generator) -> tuple[Scene, Request]:
    """A scene of the world and the request that it answers."""
    request = sample_request(rng)
    return compose(request, rng), request


def compose(request: Request, rng: np.random.Generator) -> Scene:
    """A scene in which every condition of `request` holds and nothing else is present."""
    background = request.background or pick(rng, words.BACKGROUNDS)
    plain = rng.random() < 0.5
    return Scene(
        things=_place(request, rng),
        background=background,
        background_rgb=_jitter(words.BACKGROUND_RGB[background], 5, rng),
        texture="plain" if plain else TEXTURES[int(rng.integers(1, len(TEXTURES)))],
        texture_strength=0.0 if plain else float(rng.uniform(5, 11)),
        texture_period=int(rng.integers(3, 9)),
    )


def _jitter(
    rgb: tuple[int, int, int], spread: int, rng: np.random.Generator
) -> tuple[int, int, int]:
    shifted = np.clip(np.array(rgb) + rng.integers(-spread, spread + 1, 3), 0, 255)
    return cast(tuple[int, int, int], tuple(int(c) for c in shifted))


def _place(request: Request, rng: np.random.Generator) -> tuple[Thing, ...]:
    """Rejection sampling; an unlucky start (no room left) is drawn again as a whole."""
    while True:
        things: list[Thing] = []
        for group in request.groups:
            for _ in range(group.count):
                thing = _try_place(group, things, request, rng)
                if thing is None:
                    break
                things.append(thing)
        if len(things) == sum(group.count for group in request.groups):
            return tuple(things)


def _try_place(
    group: Group, placed: list[Thing], request: Request, rng: np.random.Generator
) -> Thing | None:
    size = group.size or pick(rng, words.SIZES)
    colour = group.colour or _open_colour(group, request, rng)
    radius = float(rng.choice(words.RADII[size]))
    low, high = radius + MARGIN, SIZE - radius - MARGIN
    for _ in range(30):
        # half pixels: masks are cached
        x, y = (round(2 * at) / 2 for at in rng.uniform(low, high, 2).tolist())
        if placed and not _related(request.relation, placed[0], x, y):
            continue
        if all(
            max(abs(x - other.x), abs(y - other.y)) >= radius + other.radius + GAP
            for other in placed
        ):
            rgb = _jitter(words.RGB[colour], 8, rng)
            return Thing(group.shape, colour, size, x, y, radius, rgb)
    return None


def _open_colour(group: Group, request: Request, rng: np.random.Generator) -> str:
    """A colour for a group whose prompt names none: any but those of a like-shaped group."""
    taken = {g.colour for g in request.groups if g.shape == group.shape and g is not group}
    return pick(rng, {colour: None for colour in words.COLOURS if colour not in taken})


def _related(relation: str | None, first: Thing, x: float, y: float) -> bool:
    """Whether `first` stands in `relation` to a thing at (x, y), clearly."""
    if relation is None:
        return True
    offsets = {
        "left of": x - first.x,
        "right of": first.x - x,
        "above": y - first.y,
        "below": first.y - y,
    }
    return offsets[relation] >= RELATION_OFFSET


def render(scene: Scene) -> Image:
    """Paint a scene. Returns uint8 (32, 32, 3)."""
    canvas = np.empty((SIZE, SIZE, 3), np.float32)
    canvas[:] = scene.background_rgb
    if scene.texture_strength:
        pattern = _pattern(scene.texture, scene.texture_period)
        canvas += (scene.texture_strength * pattern)[..., None]
    for thing in scene.things:
        _paint(canvas, thing)
    return np.clip(np.rint(canvas), 0, 255).astype(np.uint8)


def _paint(canvas: NDArray[np.float32], thing: Thing) -> None:
    top, left = int(thing.y - thing.radius) - 1, int(thing.x - thing.radius) - 1
    mask = shape_mask(thing.shape, thing.radius, thing.x - left, thing.y - top)
    bottom, right = min(SIZE, top + mask.shape[0]), min(SIZE, left + mask.shape[1])
    cover = mask[: bottom - top, : right - left, None]
    patch = canvas[top:bottom, left:right]
    patch += cover * (np.array(thing.rgb, np.float32) - patch)


@lru_cache(maxsize=4096)
def shape_mask(shape: str, radius: float, cx: float, cy: float) -> NDArray[np.float32]:
    """Coverage (H, W) in [0, 1] of a shape centred at (cx, cy), by 8 x 8 samples a pixel."""
    side = int(np.ceil(2 * radius)) + 3
    at = (np.arange(side * 8) + 0.5) / 8
    u, v = (at[None, :] - cx) / radius, (at[:, None] - cy) / radius
    inside = INSIDE[shape](u, v)
    return inside.reshape(side, 8, side, 8).mean((1, 3), dtype=np.float32)


def _circle(u: NDArray[np.float64], v: NDArray[np.float64]) -> NDArray[np.bool_]:
    return u**2 + v**2 <= 1


def _square(u: NDArray[np.float64], v: NDArray[np.float64]) -> NDArray[np.bool_]:
    return np.maximum(abs(u), abs(v)) <= 0.92


def _triangle(u: NDArray[np.float64], v: NDArray[np.float64]) -> NDArray[np.bool_]:
    return (v <= 0.9) & (v >= 2 * abs(u) - 0.95)


def _star(u: NDArray[np.float64], v: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Five points up: inside the pentagram whose inner radius is 0.38 of the outer."""
    v = v + 0.05
    angle = np.arctan2(u, -v)
    sector = np.abs((angle + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
    distance = np.hypot(u, v) / 1.08
    inner = 0.38
    # The edge from the tip (1, 0) to the notch (inner at 36 degrees), as a half plane in polar
    # form.
    notch = np.array([inner * np.cos(np.pi / 5), inner * np.sin(np.pi / 5)])
    x, y = distance * np.cos(sector), distance * np.sin(sector)
    return (notch[1] * (x - 1) - (notch[0] - 1) * y) <= 0


def _cross(u: NDArray[np.float64], v: NDArray[np.float64]) -> NDArray[np.bool_]:
    arm = 0.33
    return ((abs(u) <= arm) & (abs(v) <= 1)) | ((abs(v) <= arm) & (abs(u) <= 1))


INSIDE = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
}


@lru_cache(maxsize=256)
def _pattern(texture: str, period: int) -> NDArray[np.float32]:
    """A texture (32, 32) in [-1, 1]."""
    row, column = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)
    half = period / 2
    patterns = {
        "stripes": np.where((row + column) % period < half, 1.0, -1.0),
        "checks": np.where((row // half + column // half) % 2 == 0, 1.0, -1.0),
        "dots": np.where(np.hypot(row % period - half, column % period - half) < half / 2, 1, -0.3),
        "gradient": row / (SIZE - 1) * 2 - 1,
    }
    return patterns[texture].astype(np.float32)
