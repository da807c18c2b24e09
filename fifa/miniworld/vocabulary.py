"""What the mini world is made of:

shapes, colours, sizes, backgrounds, and the words people use for them.
"""

from __future__ import annotations

IMAGE_SIZE = 32  # pixels a side

SHAPES: dict[str, tuple[str, ...]] = {
    "circle": ("circle", "disc", "ball"),
    "square": ("square", "box", "block"),
    "triangle": ("triangle",),
    "star": ("star",),
    "cross": ("cross", "plus"),
}
COLOURS: dict[str, tuple[str, ...]] = {
    "red": ("red", "crimson", "scarlet"),
    "orange": ("orange",),
    "yellow": ("yellow", "golden"),
    "green": ("green", "emerald"),
    "blue": ("blue", "azure"),
    "purple": ("purple", "violet"),
    "pink": ("pink", "rose"),
}
SIZES: dict[str, tuple[str, ...]] = {
    "small": ("small", "little", "tiny"),
    "large": ("large", "big", "huge"),
}
BACKGROUNDS: dict[str, tuple[str, ...]] = {
    "white": ("white",),
    "gray": ("gray", "grey"),
    "black": ("black", "dark"),
    "beige": ("beige", "cream"),
}
RELATIONS: dict[str, tuple[str, ...]] = {
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above", "over", "higher than"),
    "below": ("below", "under", "beneath"),
}
COUNTS: dict[int, tuple[str, ...]] = {
    1: ("a", "one", "a single"),
    2: ("two", "2", "a pair of"),
    3: ("three", "3"),
    4: ("four", "4"),
}
BANS: tuple[str, ...] = ("without", "without any", "with no", "but no", "and no")
OPENINGS: tuple[str, ...] = (
    "",
    "",
    "",
    "a picture of",
    "an image of",
    "a drawing of",
    "a photo of",
    "a simple picture showing",
)
SETTINGS: tuple[str, ...] = ("on a {} background", "against a {} backdrop", "on a {} canvas")

RGB: dict[str, tuple[int, int, int]] = {
    "red": (222, 38, 38),
    "orange": (246, 140, 26),
    "yellow": (246, 216, 46),
    "green": (48, 170, 72),
    "blue": (46, 92, 222),
    "purple": (142, 58, 182),
    "pink": (250, 128, 190),
}
BACKGROUND_RGB: dict[str, tuple[int, int, int]] = {
    "white": (240, 240, 240),
    "gray": (150, 150, 150),
    "black": (24, 24, 24),
    "beige": (226, 211, 180),
}
# Half the side of an object's bounding box, in pixels. The oracle splits the two sizes half-way
# between.
RADII: dict[str, tuple[float, ...]] = {"small": (4.25, 4.5, 4.75), "large": (5.75, 6.0, 6.25)}
SIZE_BOUNDARY = 5.25
