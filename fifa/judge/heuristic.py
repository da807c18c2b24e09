"""The offline judge of text quality, no language model: it counts and looks words up.

It knows nothing of meaning; it finds what wild prompts suffer from.
"""

from __future__ import annotations

import gzip
import importlib.util
import itertools
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from pathlib import Path

from fifa.config import InputError
from fifa.judge import Quality


class HeuristicJudge:
    """Offline fallback, no LLM: starts at 10 and takes off for what wild prompts suffer from.

    Words that are none, addresses, other scripts (which it cannot read), symbols, repetition, too
    few or too many words, talk, praise in place of content, and words of harm; and a little for
    saying less than it could, which orders the many that have no fault. Each deduction is a
    function below; the reason lists those that applied.

        score = 10 prod(1 - deduction / 10)

    so a fault takes its share of what the others left, and of two bad prompts one is still worse.
    """

    name = "heuristic:v3"

    def score(self, prompts: Sequence[str]) -> list[Quality]:
        """Judge each prompt by itself; never None."""
        return [_judge(prompt) for prompt in prompts]


def _judge(prompt: str) -> Quality:
    text = unicodedata.normalize("NFKC", prompt)
    deductions = [(points(text), why) for why, points in _DEDUCTIONS.items()]
    found = [(points, why) for points, why in sorted(deductions, reverse=True) if points >= 0.05]
    score = 10.0 * math.prod(1 - points / 10 for points, _ in deductions)
    reason = ", ".join(f"{why} -{points:.1f}" for points, why in found)
    return Quality(round(score, 3), reason or "nothing to object")


@lru_cache(maxsize=4)
def _words(text: str) -> tuple[str, ...]:
    return tuple(_WORD.findall(text.casefold()))


_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)?")


_ADDRESS = re.compile(
    r"https?:\S*|www\.\S+|\S+@\w+\.\w+|<@\S*|\b[\w-]+\.(?:jpe?g|png|html?)\b"
    r"|</?(?:a|b|br|div|i|img|p|script|span)\b[^>]*>",
    re.IGNORECASE,
)
_SITE = re.compile(r"\b[\w-]+\.(?:com|net|org|io|gg)\b", re.IGNORECASE)


def _address(text: str) -> float:
    """Web and mail addresses, handles of chats, markup: worst where hardly a word is beside."""
    if _ADDRESS.search(text):
        return 4.0 if len(_words(_ADDRESS.sub(" ", text))) >= 5 else 7.0
    return 1.5 * bool(_SITE.search(text))


def is_harmful(prompt: str) -> bool:
    """Whether a prompt holds a word of the harm list."""
    return bool(_HARM.search(unicodedata.normalize("NFKC", prompt)))


def _harm(text: str) -> float:
    return 8.0 * bool(_HARM.search(text))


def _aggression(text: str) -> float:
    """Milder than harm: blows, threats, theft, drink; often a wish to drop, often a story."""
    return 3.0 * bool(_AGGRESSIVE.search(_HARMLESS.sub(" ", text)))


def _talk(text: str) -> float:
    """Words to a chat partner: no picture is described."""
    return 4.0 * bool(_TALK.search(text))


def _praise(text: str) -> float:
    """Words that only praise the picture, beyond a third of the text."""
    total = len(_words(text))
    praise = sum(len(_words(match)) for match in _PRAISE.findall(text))
    return 4.0 * max(0.0, praise / total - 0.35) / 0.65 if total else 0.0


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
    """Words that are no words and do not run like some: a share of the letters beyond a seventh.

    What stands after "by" is taken for a name, and so is a single strange word: a name may run
    more freely. Four letters are no evidence, they may be an acronym.
    """
    names = _names(text)
    odd = [letters for letters, mixed in _tokens(text) if _is_odd(letters, mixed, names)]
    if len(odd) == 1 and surprise(odd[0]) <= _STRANGE_NAME:
        return 0.0
    strange = sum(map(len, odd))
    total = sum(len(letters) for letters, _ in _tokens(text))
    share = strange / total if strange > 4 else 0.0
    return 8.0 * min(1.0, max(0.0, share - 0.15) / 0.45)


def _is_odd(letters: str, mixed: bool, names: frozenset[str]) -> bool:
    usual = _STRANGE_NAME if letters in names else _STRANGE
    return mixed or (len(letters) > 3 and not _known(letters) and surprise(letters) > usual)


_AUTHOR = re.compile(r"\b(?:by|and) ((?:(?!and )[a-z]+ ?){1,3})")


@lru_cache(maxsize=4)
def _names(text: str) -> frozenset[str]:
    """Up to three words after "by", or after an "and", which may join two artists."""
    return frozenset(word for found in _AUTHOR.findall(_plain(text)) for word in found.split())


def _misspelt(text: str) -> float:
    """Words that nobody knows, rare names among them: a small deduction beyond a fifth."""
    unknown = total = 0
    names = _names(text)
    for letters, _ in _tokens(text):
        odd = len(letters) > 3 and letters not in names and not _known(letters)
        unknown += len(letters) * odd
        total += len(letters)
    share = unknown / total if total else 0.0
    return 2.0 * min(1.0, max(0.0, share - 0.2) / 0.5)


@lru_cache(maxsize=4)
def _tokens(text: str) -> list[tuple[str, bool]]:
    """The words in plain letters a-z, and whether digits are strewn into them."""
    found = []
    for token in re.findall(r"\w+", text.casefold()):
        letters = _plain("".join(letter for letter in token if letter.isalpha()))
        if letters and letters.isascii():
            mixed = (
                len(token) > 4
                and not token.isalpha()
                and re.search(r"\d[^\W\d_]+\d|[^\W\d_]\d+[^\W\d_]", token)
            )
            found.append((letters, bool(mixed)))
    return found


def _repetition(text: str) -> float:
    """Words said again and again, articles and the like aside."""
    words = [word for word in _words(text) if word not in _SMALL_WORDS]
    if len(words) < 3:
        return 0.0
    again = 1 - len(set(words)) / len(words)
    return 7.0 * max(0.0, again - 0.35) / 0.65


def _vague(text: str) -> float:
    """Fewer than three words leave the picture open; up to eight say a little more each."""
    words = len(_words(text))
    return {0: 6.0, 1: 4.0, 2: 1.5}.get(words, 0.1 * max(0, 8 - words))


def _long(text: str) -> float:
    """Beyond some 60 words a CLIP text encoder stops reading."""
    return min(3.0, max(0, len(_words(text)) - 60) / 20)


def _unspecific(text: str) -> float:
    """Up to 0.3 points for naming fewer than 40 different things, on a logarithmic scale.

    Praise is no thing, and neither is an artist: a row of them shows nothing.
    """
    words = _words(_PRAISE.sub(" ", _without_artists(text)))
    known = sum(len(word) > 2 and _known(word) for word in {*words} - _SMALL_WORDS)
    return 0.3 * max(0.0, 1 - math.log1p(known) / math.log1p(40))


_ARTISTS = re.compile(
    r"\bby (?!an? |the )(?:(?!and )[a-z]+ ?){1,3}(?:and (?:(?!and )[a-z]+ ?){1,3})*"
)


@lru_cache(maxsize=4)
def _without_artists(text: str) -> str:
    """The text in plain letters, without "by one" and "by one and another"."""
    return _ARTISTS.sub(" ", _plain(text))


def _list_of_words(text: str) -> float:
    """Up to 0.3 points for words in a row that no small word ties together."""
    words = _words(_without_artists(text))
    small = sum(word in _SMALL_WORDS for word in words)
    return 0.3 * max(0.0, 1 - small / len(words) / 0.35) if words else 0.0


def _persons(text: str) -> float:
    """0.3 points for "I" and "you": somebody is told something, instead of a picture described."""
    return 0.3 * any(word in _SPEAKERS for word in _words(text))


def _some_praise(text: str) -> float:
    """Up to 0.3 points for praise and the names of renderers, however much content is beside."""
    words = len(_words(text))
    praise = sum(len(_words(match)) for match in _PRAISE.findall(text))
    return 0.3 * min(1.0, praise / words / 0.35) if words else 0.0


_DEDUCTIONS: dict[str, Callable[[str], float]] = {
    "harmful words": _harm,
    "aggressive words": _aggression,
    "an address or markup": _address,
    "letters this judge cannot read": _other_script,
    "gibberish": _gibberish,
    "unknown words": _misspelt,
    "mostly signs": _symbols,
    "repetition": _repetition,
    "talk": _talk,
    "mostly praise": _praise,
    "hardly any words": _vague,
    "too long": _long,
    "says little": _unspecific,
    "a list of words": _list_of_words,
    "some praise": _some_praise,
    "speaks to somebody": _persons,
}

# Words that ask for harm as such, nudity and sex included. A list cannot understand, only catch the
# plain; words that are as often part of a story stand below.
_HARM = re.compile(
    r"\b(?:ahegao|bdsm|blowjobs?|castrat\w*|corpses?|dildos?|dismember\w*|erotic\w*|fetish\w*"
    r"|genitals?|gor[ey]|guro|hateful|hentai|injur(?:y|ies)|intestines?|masturbat\w*"
    r"|murder(?:ed|ing)?(?! of crows)|naked|nsfw|nud(?:e|es|ity)|orgasm\w*|orgy|penis\w*|porn\w*"
    r"|rap(?:e|ed|ist|ists)|selfharm\w*|snuff|suicide(?! squad)|testicles?|topless|tortur\w*|urine"
    r"|vagina\w*|(?:graphic|open) wounds?)\b",
    re.IGNORECASE,
)
_AGGRESSIVE = re.compile(
    r"\b(?:arson\w*|bloody|bull(?:y|ied|ies|ying)|burglar\w*|drugs?|drugged|drunk|insult\w*"
    r"|kick(?:s|ed|ing)|kill(?:s|ed|ing|er)?|poison(?:s|ed|ing)|punch(?:es|ed|ing)"
    r"|rob(?:s|bed|bing|ber|bers|bery)|slap(?:s|ped|ping)|smash(?:es|ed|ing)|stab(?:s|bed|bing)"
    r"|steal(?:s|ing)?|stole|stolen|strangl\w*|thie(?:f|ves)|threaten\w*|vandal\w*|violen\w*|wound(?:s|ed)?)\b",
    re.IGNORECASE,
)
# Titles and turns of phrase that only sound like it.
_HARMLESS = re.compile(
    r"\bkill (?:la kill|bill)\b|\bviolent (?:ocean|sea|storm|waves?|wind)\b|\bbloody mary\b",
    re.IGNORECASE,
)
_TALK = re.compile(
    r"^\W*(?:hi|hello|hey|thanks|thank you|can you|could you|how (?:are|do|to|can)"
    r"|what (?:is|are|do)|why|who (?:is|are)|tell me|based on this)\b"
    r"|\bignore (?:all|the|any) (?:above|previous)\b|\bI (?:suggest|recommend|would like)\b",
    re.IGNORECASE,
)
_PRAISE = re.compile(
    r"\b(?:\d+k|absurdres|amazing|award[- ]winning|beautiful|best quality|breathtaking|epic"
    r"|(?:extremely|highly|hyper|insanely|intricate|ultra|very)[- ]?(?:detailed|realistic)|hdr|hd"
    r"|high (?:quality|resolution|detail)|high res|hyper ?realistic|incredible|intricate details?"
    r"|masterpiece|perfect (?:composition|lighting)|sharp focus|stunning|top quality"
    r"|trending on \w+|uhd|ultra ?realistic|unreal engine(?: \d)?|octane render)\b",
    re.IGNORECASE,
)
_SMALL_WORDS = frozenset(["a", "an", "her", "his", "is", "its", "that", "the", "their", "who"])
_SMALL_WORDS |= {"and", "as", "at", "by", "from", "in", "into", "of", "on", "or", "over"}
_SMALL_WORDS |= {"to", "under", "while", "with"}
_SPEAKERS = frozenset(["i", "me", "my", "you", "your", "we", "us", "our"])

# ---- words, as far as the vocabulary of CLIP's text encoder tells --------------------------------

# Mean bits a letter, see `surprise`, of a word that is no word, and of one that is no name either.
_STRANGE, _STRANGE_NAME = 4.75, 5.6
_MERGES = 48_894  # pairs that CLIP's tokenizer merges; the rest of the file is not used


@cache
def _known_words() -> frozenset[str]:
    """Words that are one token of CLIP, a-z: the 30,000 commonest of web captions, names included.

    open_clip ships them; the file is read without importing it.
    """
    package = importlib.util.find_spec("open_clip")
    if package is None or package.origin is None:
        raise InputError("the heuristic judge needs the package open_clip_torch; install it")
    path = Path(package.origin).with_name("bpe_simple_vocab_16e6.txt.gz")
    lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")[1 : _MERGES + 1]
    joined = (line.replace(" ", "") for line in lines)
    return frozenset(
        word for word in (text[:-4] for text in joined if text.endswith("</w>")) if _is_plain(word)
    )


def _is_plain(word: str) -> bool:
    return word.isascii() and word.isalpha()


@lru_cache(maxsize=100_000)
def _known(word: str) -> bool:
    """Whether a word, its simple forms, or both halves of a compound are known."""
    known = _known_words()
    stems = [word, *(word.removesuffix(end) for end in ("s", "es", "ed", "d", "ing", "ly", "ish"))]
    stems += [stem[:-1] for stem in stems if stem[-2:-1] == stem[-1:]]  # wagg-ing: wag
    if any(stem in known for stem in stems if len(stem) > 2):
        return True
    cuts = range(3, len(word) - 2)
    return any(word[:cut] in known and word[cut:] in known for cut in cuts if len(word) > 7)


def _plain(word: str) -> str:
    """Letters without accents: é as e."""
    if word.isascii():
        return word.lower()
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
def _letter_pairs() -> dict[tuple[str, str], float]:
    """-log2 P(second | first) of every pair of a-z and the word's end, from the known words."""
    alphabet = " abcdefghijklmnopqrstuvwxyz"
    text = " ".join(["", *sorted(word for word in _known_words() if len(word) > 3), ""])
    pairs = Counter(itertools.pairwise(text))
    firsts = Counter(text[:-1])
    return {
        (a, b): -math.log2((pairs[a, b] + _SMOOTHING) / (firsts[a] + _SMOOTHING * len(alphabet)))
        for a in alphabet
        for b in alphabet
    }
