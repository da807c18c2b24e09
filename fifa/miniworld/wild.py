"""Prompts as people really type them: popular ones, slips of the keyboard, lines about nothing.

Whatever its dirt, a prompt never means something that is held out: what `parse` reads in it belongs
to the train split, or is nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from fifa.miniworld.captions import Request, UnparsedPrompt, parse, phrase, prompts, sample_request

# Share of the rows of a data set whose prompt is of each kind.
PROMPT_SHARES: dict[str, float] = {
    "fresh": 0.60,  # a new wording of a new request
    "popular": 0.20,  # one of POPULAR prompts, word for word
    "near_duplicate": 0.10,  # one of those, with a slip, other case or punctuation, or a tail
    "gibberish": 0.03,
    "other_script": 0.03,  # Chinese, Cyrillic, Arabic
    "url": 0.02,  # half of them followed by a proper prompt
    "harmful": 0.02,  # a wish that a careful curator drops, mildly worded
}
POPULAR = 2000  # prompts that many people use; the n-th with a chance proportional to 1 / (n + 2)


@dataclass(frozen=True)
class WildPrompt:
    """What was typed, what its author meant (None: nothing of the mini world), and its kind."""

    text: str
    request: Request | None
    kind: str


def draw_prompt(rng: np.random.Generator, seed: int) -> WildPrompt:
    """A prompt of a kind drawn by PROMPT_SHARES; `seed` decides which prompts are popular."""
    return draw_prompt_of(
        str(rng.choice(list(PROMPT_SHARES), p=list(PROMPT_SHARES.values()))), rng, seed
    )


def draw_prompt_of(kind: str, rng: np.random.Generator, seed: int) -> WildPrompt:
    """A prompt of one kind of PROMPT_SHARES."""
    while True:
        prompt = _KINDS[kind](rng, seed)
        if _trainable(prompt):
            return prompt


def _trainable(prompt: WildPrompt) -> bool:
    """Whether the text says nothing held out, and says something only where something is meant."""
    try:
        return parse(prompt.text).split == "train" and prompt.request is not None
    except UnparsedPrompt:
        return True


# ---- prompts about the mini world ----------------------------------------------------------------


def _fresh(rng: np.random.Generator, seed: int) -> WildPrompt:
    request = sample_request(rng, "train")
    return WildPrompt(phrase(request, rng), request, "fresh")


def _popular(rng: np.random.Generator, seed: int) -> WildPrompt:
    pool, chances = _pool(seed)
    text = pool[int(rng.choice(POPULAR, p=chances))]
    return WildPrompt(text, parse(text), "popular")


@lru_cache(maxsize=2)
def _pool(seed: int) -> tuple[list[str], np.ndarray[tuple[int], np.dtype[np.float64]]]:
    chances = 1 / (np.arange(POPULAR) + 2.0)
    return prompts("train", POPULAR, seed), chances / chances.sum()


def _near_duplicate(rng: np.random.Generator, seed: int) -> WildPrompt:
    original = _popular(rng, seed)
    slips = list(_SLIPS)
    chosen = rng.choice(len(slips), size=int(rng.integers(1, 3)), replace=False)
    text = original.text
    for index in sorted(chosen):  # typos before case and tails, as one types
        text = slips[index](text, rng)
    return WildPrompt(text, original.request, "near_duplicate")


def _typo(text: str, rng: np.random.Generator) -> str:
    """Two letters of one word swapped, one dropped, or one doubled."""
    words = text.split()
    long = [i for i, word in enumerate(words) if len(word) > 3]
    if not long:
        return text
    at = int(rng.choice(long))
    word = words[at]
    i = int(rng.integers(1, len(word) - 1))
    words[at] = (
        word[:i] + word[i + 1] + word[i] + word[i + 2 :],
        word[:i] + word[i + 1 :],
        word[:i] + word[i] + word[i:],
    )[int(rng.integers(3))]
    return " ".join(words)


def _case(text: str, rng: np.random.Generator) -> str:
    return (text.upper(), text.title(), text.capitalize())[int(rng.integers(3))]


def _tail(text: str, rng: np.random.Generator) -> str:
    return text + _TAILS[int(rng.integers(len(_TAILS)))]


def _punctuation(text: str, rng: np.random.Generator) -> str:
    endings = (".", "!", "!!!", "...", " ,", "  ", " .", "?")
    return text + endings[int(rng.integers(len(endings)))]


_SLIPS: tuple[Callable[[str, np.random.Generator], str], ...] = (_typo, _case, _tail, _punctuation)
_TAILS = (
    ", trending on artstation, 8k",
    ", highly detailed, masterpiece",
    ", best quality, sharp focus",
    ", octane render, cinematic lighting",
    ", 4k, hdr, award winning",
    ", digital art",
    " --ar 1:1",
    " in the style of a children's book",
    ", minimalist, vector art",
    " please",
)


# ---- prompts about nothing, or nothing one should draw -------------------------------------------


def _gibberish(rng: np.random.Generator, seed: int) -> WildPrompt:
    def letters(alphabet: str, low: int, high: int) -> str:
        return "".join(rng.choice(list(alphabet), size=int(rng.integers(low, high))))

    def text() -> str:
        words = int(rng.integers(1, 6))
        way = int(rng.integers(4))
        if way == 0:
            return " ".join(letters("abcdefghijklmnopqrstuvwxyz", 2, 11) for _ in range(words))
        if way == 1:
            return letters("asdfghjkl;", 5, 30)
        if way == 2:
            return " ".join([letters("abeilmnorstu", 2, 5)] * (words + 2))
        return " ".join(letters("0123456789!?#%&*()_+-=", 1, 9) for _ in range(words))

    return WildPrompt(text(), None, "gibberish")


# language: colours, shapes, sentences with places for a colour and a shape
_SCRIPTS: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "chinese": (
        ("红色", "蓝色", "绿色", "黄色", "紫色"),
        ("圆形", "正方形", "三角形", "星星", "十字"),
        ("一个{}的{}", "白色背景上的{}{}", "画一个很大的{}{}", "两个{}的{},简单的图画"),
    ),
    "russian": (
        ("красный", "синий", "зелёный", "жёлтый", "розовый"),
        ("круг", "квадрат", "треугольник", "крест"),
        ("{} {} на белом фоне", "нарисуй {} {}", "большой {} {}", "{} {}, простая картинка"),
    ),
    "arabic": (
        ("أحمر", "أزرق", "أخضر", "أصفر", "بنفسجي"),
        ("مربع", "مثلث", "صليب", "نجم"),
        ("{1} {0} على خلفية بيضاء", "ارسم {1} {0}", "صورة بسيطة: {1} {0}", "{1} كبير {0}"),
    ),
}


def _other_script(rng: np.random.Generator, seed: int) -> WildPrompt:
    colours, shapes, sentences = list(_SCRIPTS.values())[int(rng.integers(len(_SCRIPTS)))]
    colour = colours[int(rng.integers(len(colours)))]
    shape = shapes[int(rng.integers(len(shapes)))]
    sentence = sentences[int(rng.integers(len(sentences)))]
    return WildPrompt(sentence.format(colour, shape), None, "other_script")


def _url(rng: np.random.Generator, seed: int) -> WildPrompt:
    folder = ("img", "uploads", "ref", "attachments")[int(rng.integers(4))]
    ending = ("png", "jpg", "webp")[int(rng.integers(3))]
    address = f"https://pictures.example/{folder}/{rng.bytes(5).hex()}.{ending}"
    if rng.random() < 0.5:
        return WildPrompt(address, None, "url")
    prompt = _fresh(rng, seed)
    return WildPrompt(f"{address} {prompt.text}", prompt.request, "url")


_ACTORS = (
    "a cartoon bully",
    "an angry goblin",
    "a mean robot",
    "a gang of villains",
    "a rude pirate",
    "two drunk clowns",
    "a furious wizard",
    "a burglar in a mask",
)
_DEEDS = (
    "pushing a child",
    "stealing a wallet from an old man",
    "tripping somebody on the stairs",
    "punching a policeman",
    "setting a shed on fire",
    "smoking in front of a school",
    "scaring a kitten",
    "smashing a shop window",
    "laughing at a crying boy",
    "writing insults on a wall",
)
_LOOKS = ("", ", comic style", " at night", ", funny", ", realistic", " in the park")


def _harmful(rng: np.random.Generator, seed: int) -> WildPrompt:
    actor, deed, look = (
        table[int(rng.integers(len(table)))] for table in (_ACTORS, _DEEDS, _LOOKS)
    )
    return WildPrompt(f"{actor} {deed}{look}", None, "harmful")


_KINDS: dict[str, Callable[[np.random.Generator, int], WildPrompt]] = {
    "fresh": _fresh,
    "popular": _popular,
    "near_duplicate": _near_duplicate,
    "gibberish": _gibberish,
    "other_script": _other_script,
    "url": _url,
    "harmful": _harmful,
}
