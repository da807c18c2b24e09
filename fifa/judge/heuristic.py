"""The offline judge of text quality, no language model: it counts and looks words up.

It knows nothing of meaning; it finds what wild prompts suffer from.
"""

from __future__ import annotations

import itertools
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache, lru_cache

from fifa.judge import Quality


class HeuristicJudge:
    """Offline fallback, no LLM: starts at 10 and takes off for what wild prompts suffer from.

    Letters that no English word strings together, addresses, other scripts (which it cannot read),
    symbols, repetition, too few or too many words, and words of harm. Each deduction is a function
    below; the reason lists those that applied.
    """

    name = "heuristic:v1"

    def score(self, prompts: Sequence[str]) -> list[Quality]:
        """Judge each prompt by itself; never None."""
        return [_judge(prompt) for prompt in prompts]


def _judge(prompt: str) -> Quality:
    text = unicodedata.normalize("NFKC", prompt)
    deductions = [(points(text), why) for why, points in _DEDUCTIONS.items()]
    found = [(points, why) for points, why in sorted(deductions, reverse=True) if points >= 0.05]
    score = max(0.0, 10.0 - sum(points for points, _ in found))
    reason = ", ".join(f"{why} -{points:.1f}" for points, why in found)
    return Quality(round(score, 3), reason or "nothing to object")


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]+(?:['’][^\W\d_]+)?", text.casefold())


_ADDRESS = re.compile(
    r"https?:|www\.|\w@\w+\.|\w\.(?:com|net|org|io|gg|jpe?g|png|html?)\b|</?\w+[ >/]|<@",
    re.IGNORECASE,
)


def _address(text: str) -> float:
    """Web and mail addresses, handles of chats, markup."""
    return 7.0 * bool(_ADDRESS.search(text))


def _harm(text: str) -> float:
    return 8.0 * any(word in _HARM for word in _words(text))


def _aggression(text: str) -> float:
    """Milder than harm: blows, threats, theft, drink; often a wish to drop, sometimes a story."""
    return 4.0 * bool(_AGGRESSIVE.search(text))


def _other_script(text: str) -> float:
    """Letters beyond Latin: up to 8 points, for this judge cannot tell what they say."""
    if text.isascii():
        return 0.0
    letters = [letter for letter in text if letter.isalpha()]
    other = sum(not unicodedata.name(letter, "").startswith("LATIN") for letter in letters)
    return 8.0 * other / len(letters) if letters else 0.0


def _symbols(text: str) -> float:
    """Digits and signs beyond a quarter of the text; a text without letters loses everything."""
    shown = [letter for letter in text if not letter.isspace()]
    share = sum(not letter.isalpha() for letter in shown) / len(shown) if shown else 1.0
    return 10.0 * max(0.0, share - 0.25) / 0.75


def _gibberish(text: str) -> float:
    """Words that do not run like English: a large share of them, or a high mean over all."""
    strange = total = 0
    bits = 0.0
    for token in re.findall(r"\w+", text.casefold()):
        letters = _plain("".join(letter for letter in token if letter.isalpha()))
        if not letters or not letters.isascii():
            continue
        known = letters in _known_words()
        mixed = len(token) > 4 and re.search(r"\d[^\W\d_]+\d|[^\W\d_]\d+[^\W\d_]", token)
        long_and_odd = len(letters) > 3 and not known and surprise(letters) > _STRANGE_BITS
        strange += len(letters) * bool(mixed or long_and_odd)
        bits += len(letters) * (_USUAL_BITS if known else surprise(letters))
        total += len(letters)
    if not total:
        return 0.0
    share, mean = strange / total, bits / total
    return 8.0 * min(1.0, max(0.0, (share - 0.15) / 0.6, (mean - _STRANGE_MEAN) / 1.0))


def _repetition(text: str) -> float:
    """Words said again and again, articles and the like aside."""
    words = [word for word in _words(text) if word not in _SMALL_WORDS]
    if len(words) < 3:
        return 0.0
    again = 1 - len(set(words)) / len(words)
    return 7.0 * max(0.0, again - 0.35) / 0.65


def _vague(text: str) -> float:
    """Fewer than three words leave the picture open."""
    return {0: 6.0, 1: 4.0, 2: 1.5}.get(len(_words(text)), 0.0)


def _long(text: str) -> float:
    """Beyond some 60 words a CLIP text encoder stops reading."""
    return min(3.0, max(0, len(_words(text)) - 60) / 20)


_DEDUCTIONS: dict[str, Callable[[str], float]] = {
    "harmful words": _harm,
    "aggressive words": _aggression,
    "an address or markup": _address,
    "letters this judge cannot read": _other_script,
    "gibberish": _gibberish,
    "mostly signs": _symbols,
    "repetition": _repetition,
    "hardly any words": _vague,
    "too long": _long,
}

# Words that ask for harm as such. Short on purpose: a list cannot understand, only catch the plain.
_HARM_WORDS = """
bloody corpse corpses gore gory hateful injuries injury kill killed killing murder murdered nsfw
nude nudity suicide torture tortured violence violent wound wounded wounds
"""
_HARM = frozenset(_HARM_WORDS.split())
_AGGRESSIVE = re.compile(
    r"\b(?:arson|bull(?:y|ie)|burglar|drug|drunk|insult|kick|poison|punch|robb|slap|smash|stab|steal"
    r"|stole|strangl|thie(?:f|ve)|threaten|vandal|weapon)\w*",
    re.IGNORECASE,
)
_SMALL_WORDS = frozenset(["a", "an", "and", "at", "by", "in", "is", "of", "on", "or", "the", "to"])

# ---- English, as far as two neighbouring letters tell --------------------------------------------

# Mean bits a letter, see `surprise`: of one word, of a whole prompt, of a word in the list below.
_STRANGE_BITS, _STRANGE_MEAN, _USUAL_BITS = 4.9, 4.3, 3.5


def _plain(word: str) -> str:
    """Letters without accents: é as e."""
    split = unicodedata.normalize("NFD", word.casefold())
    return "".join(letter for letter in split if not unicodedata.combining(letter))


@lru_cache(maxsize=100_000)
def surprise(word: str) -> float:
    """Mean bits a letter of a word under English letter pairs, its two ends included.

    English words lie around 3.7 bits, random letters around 6.
    """
    table = _letter_pairs()
    marked = f" {_plain(word)} "
    pairs = list(itertools.pairwise(marked))
    return sum(table.get(pair, _UNSEEN_BITS) for pair in pairs) / len(pairs)


_SMOOTHING = 0.1  # added to each count
_UNSEEN_BITS = 12.0  # of a letter outside a-z


@cache
def _known_words() -> frozenset[str]:
    return frozenset(_ENGLISH.split())


@cache
def _letter_pairs() -> dict[tuple[str, str], float]:
    """-log2 P(second | first) of every pair of a-z and the word's end, from the words below."""
    alphabet = " abcdefghijklmnopqrstuvwxyz"
    text = " ".join(["", *_ENGLISH.split(), ""])
    pairs = Counter(itertools.pairwise(text))
    firsts = Counter(text[:-1])
    return {
        (a, b): -math.log2((pairs[a, b] + _SMOOTHING) / (firsts[a] + _SMOOTHING * len(alphabet)))
        for a in alphabet
        for b in alphabet
    }


_ENGLISH = """
a about above abstract across afternoon again air alien all alone along among an ancient and angel
animal anime another apple architecture arm armor art artist artwork as astronaut at atmosphere
autumn baby back background ball band bath battle beach bear beard beautiful bed before behind
below beneath between big bird black blonde blue board boat body book both bottle bottom bowl box
boy bread bridge bright brown brush building burning bus but butterfly by cafe cake camera candle
canvas car card cartoon castle cat ceiling center century chair character cheese chicken child
children chocolate christmas cinematic circle city classic clean clear close clothes cloud coat
coffee cold color colorful colour comic complex computer concept cool corner costume cottage couple
cover cow creature crowd crown crystal cube cup curly cute cyberpunk dark day deep delicate desert
design detail detailed different dinner dinosaur dirty distance dog door down dragon dramatic
drawing dream dress drink driving drone dust each eagle earth easy eating edge egg elegant elephant
empty energy engine epic evening every expression eye eyes face fairy falling family famous fantasy
farm fashion fast father feather female field fighting figure film fire fish five flag flat floating
floor flower flowers flying focus fog food foot football for forest four fox frame friend from front
fruit full funny furniture future galaxy game garden ghost giant girl glass glasses glowing gold
golden good grass gray great green grey ground group guitar hair half hand hands hanging happy hard
hat have head heart helmet her hero hidden high highly hill his holding hole holiday home horse hot
house huge human hundred hyper ice illustration image in inside intricate into iron is island its
jacket jewel journey jumping jungle kid kind king kitchen kitten knife knight lady lake lamp land
landscape laptop large laughing leaf leather leaves left leg lemon lens letter library light
lighting like line lion lips little living logo long looking lost love low machine made magic
magical male man many map market mask massive master matte me mechanical medieval men metal middle
minimalist mirror modern monkey monster moon more morning most mother motorcycle mountain mountains
mouse mouth movie much muscular mushroom music mysterious nature near neck neon new next night no
north nose not number ocean octopus of off oil old on one open orange ornate other out outdoor
outside over owl page painted painting pair palace palm panda paper park party pattern peaceful
pencil people perfect person perspective photo photograph photographer photography photorealistic
piano picture pink pirate pizza place plain plane planet plant plastic plate playing polaroid pool
portrait poster pretty prince princess print professional puppy purple pyramid queen quiet rabbit
race rain rainbow reading real realism realistic rectangle red reflection render resolution retro
ride right ring river road robot rock romantic roof room rose round row royal running sad sailing
sand scene science sculpture sea season seat second sepia seven shadow shape sharp sheep shining
ship shirt shoes shop shore short shot shoulder side silver simple single sitting six skin skirt sky
skull sleeping small smile smiling smoke smooth snow soft soldier some song south space spaceship
spoon sport spring square stage stained standing star stars statue steam steel still stone store
storm street stripes strong studio style summer sun sunflower sunglasses sunlight sunny sunset
super surface surreal surrounded swimming sword symbol table tail tall tattoo tea teacher teddy
temple ten texture that the their them there thick thin thing this three through tiger tiny to
together top touch tower town toy traditional train translucent transparent tree trees triangle
tropical truck turtle twin two ultra umbrella under underwater unicorn universe up upon valley vase
vector vegetable vehicle velvet very victorian video view village vintage violet vivid volcano
walking wall warm warrior watch water watercolor waterfall waves wearing wedding weird west wet
whale wheel while white wide wild wind window wine wings winter with without wizard wolf woman women
wonderful wood wooden woods wool word working world writing yard year yellow young zebra
"""
